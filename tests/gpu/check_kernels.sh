#!/usr/bin/env bash
# Proves the kernels on a GPU: tests, memory checker, speed. From the repository root, some minutes on an H200, most of them compilation:
#   bash tests/gpu/check_kernels.sh [--sweep]
# Every part runs even when an earlier one failed; the exit status is 1 then. The bench comes last: its last line is JSON.
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH=src PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=0

echo "== gpu tests"
timeout 300 "$python" -m pytest -q -m gpu --timeout 120 -p no:cacheprovider --durations=5 tests/backend/ops/test_kernels_*.py || failed=1

echo "== compute-sanitizer memcheck"
if command -v compute-sanitizer > /dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    "$python" tests/gpu/memcheck_cases.py > /dev/null  # compiles, so that the checker's run only launches
    timeout 100 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" tests/gpu/memcheck_cases.py 2>&1 | tail -n 15
    [ "${PIPESTATUS[0]}" -eq 0 ] || { echo "memcheck FAILED"; failed=1; }
    timeout 100 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" tests/gpu/memcheck_cases.py --plant > /tmp/planted.log 2>&1
    if grep -q "Invalid __global__ write" /tmp/planted.log; then
        echo "planted fault found, so the checker looks"
    else
        echo "planted fault NOT found:"; tail -n 15 /tmp/planted.log; failed=1
    fi
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
    echo "compute-sanitizer is not installed: not run"; failed=1
fi

echo "== bench"
timeout 200 "$python" tests/bench/bench_ops.py "$@" || failed=1
exit $failed
