#!/usr/bin/env bash
# What docs/performance.md and docs/quantization.md are made of, in parts of ten minutes at most on an H200, from the repository root:
#   bash tests/gpu/measure.sh PART... [to FOLDER]
#     steps     captured decode steps over batches and contexts, drawn
#     tiles     tiles of every kernel against each other
#     dense     the works of bench_engine.py in 16 bits, both shapes
#     kv        8B, keys and values in 8 and 4 bits
#     weights   8B, weights in 4 and 8 bits
#     ops       every kernel beside its limit and torch's
#     start     process start to first token, kernels compiled or not
#     way       through tritonserver: both doors, and the OpenAI server (BUNDLE: pack_bundle.sh's folder, where packages lack)
#     sound     GPU tests, the memory checker, 10,000 random requests
# FOLDER (default .measured) gets a log a part; DRY=1 prints the commands. Every command runs even when an earlier one failed.
set -u
cd "$(dirname "$0")/../.." || exit
export PYTHONPATH=src PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
parts=() folder=.measured failed=0
while [ $# -gt 0 ]; do
    if [ "$1" = to ]; then folder=$2; shift; else parts+=("$1"); fi
    shift
done
bench=tests/bench shm=${SHM:-/dev/shm}

run() {
    echo "\$ $*"
    [ -n "${DRY:-}" ] || "$@" || { echo "FAILED with $?: $*"; failed=1; }
}
have() { # SHAPE [DTYPE]: its checkpoint in memory, made once
    local name=$1${2:+-$2}
    [ -d "$shm/$name" ] || run "$python" $bench/make_checkpoint.py --shape "$1" ${2:+--dtype "$2"} --out "$shm/$name"
}
engine() { # NAME WORKS [OPTION...]
    local name=$1 works=$2
    shift 2
    run "$python" $bench/bench_engine.py --model "$shm/$name" --no-check --repeats 1 --work "$works" "${@/#/--option=}"
}

steps() {
    for shape in 1.8b 8b; do
        have $shape
        run "$python" $bench/sweep_steps.py --model "$shm/$shape" --batch 1,2,4,8,16,32,64,128,256 --context 256,1024,2048 --rounds 3 \
            --plots "$folder"
    done
}
tiles() {
    run "$python" $bench/sweep_tiles.py
    run "$python" $bench/sweep_tiles.py w4a16 --rows 1,16,64,256
    run "$python" $bench/bench_quantized.py --only linear,decode --sweep
}
dense() {
    have 1.8b
    run "$python" $bench/bench_engine.py --model "$shm/1.8b" --repeats 2 --work b1,d64,d256,thr,prefill,itl --trace "$folder"
    have 8b
    engine 8b b1,d16,d64,d256,thr,prefill,d8k
}
kv() {
    have 8b
    for policy in 8 4 16; do engine 8b d256,thr,d8k quant_policy=$policy; done
}
weights() {
    for dtype in int4 int8 fp8; do
        have 8b $dtype
        engine 8b-$dtype b1,d16,d64,d256,thr,prefill
        rm -rf "${shm:?}/8b-$dtype"
    done
    run "$python" $bench/bench_auto_awq.py --layers 3
}
ops() {
    run "$python" $bench/bench_ops.py
    run "$python" $bench/bench_quantized.py
}
start() {
    run "$python" $bench/make_workspace.py --shape 8b --out "$shm/8b-workspace"
    run "$python" $bench/bench_startup.py --workspace "$shm/8b-workspace"
}
way() {
    local with=(env)
    [ -z "${BUNDLE:-}" ] || with=(bash tests/gpu/serve_on_gpu.sh "$BUNDLE")
    [ -d "$shm/1.8b-workspace" ] || run "$python" $bench/make_workspace.py --shape 1.8b --out "$shm/1.8b-workspace"
    run "${with[@]}" "$python" $bench/bench_serving.py --workspace "$shm/1.8b-workspace" --repeats 1
    run "${with[@]}" "$python" $bench/bench_openai.py --shape 1.8b --concurrency 1 8 64 --num-prompts 64 --output-len 256 --repeats 3 \
        --workers 8 --option max_batch_size=64 --option session_len=1024
}
sound() {
    run "$python" -m pytest -q -m "gpu and not multigpu" -p no:cacheprovider -n 12 tests/backend
    run "$python" -m pytest -q -m gpu -p no:cacheprovider -n 2 --durations=5 tests/backend/engine/test_random_requests.py
    run bash tests/gpu/check_kernels.sh
}

mkdir -p "$folder"
for part in "${parts[@]:?"usage: measure.sh PART... [to FOLDER]"}"; do
    case $part in
        steps | tiles | dense | kv | weights | ops | start | way | sound) ;;
        *) echo "measure.sh: no part $part; the parts stand at the top of the file" >&2; exit 2 ;;
    esac
    "$part" > >(tee "$folder/$part.log") 2>&1
done
exit $failed
