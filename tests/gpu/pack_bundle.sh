#!/usr/bin/env bash
# Packs what serving needs and a bare GPU machine (Python 3.12 with torch, no network) may lack, some 45 MB:
#   bash tests/gpu/pack_bundle.sh FOLDER        # here, where pip works
#   bash tests/gpu/serve_on_gpu.sh FOLDER ...   # there
# FOLDER/runtime.txz: tritonserver, its libraries, its Python backend with the stub of 3.12, the stub's numpy; the layout of
# src/turbotriton/cli/server_runtime.py. FOLDER/site.txz: pure and cp312 packages for clients, doors and the OpenAI server.
set -eu
cd "$(dirname "$0")/../.."
out=${1:?"usage: pack_bundle.sh FOLDER"}
python=${PYTHON:-python3}
packages="tritonclient python-rapidjson llguidance fastapi starlette uvicorn uvloop httptools pydantic
annotated-types typing-inspection typing-extensions annotated-doc openai jiter distro sniffio httpx2 httpcore2 truststore opentelemetry-api"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

download() { # FOLDER PACKAGE...: wheels for CPython 3.12 on x86-64, pinned as constraints.txt has them
    local folder=$1 name pin
    shift
    local platforms=(any manylinux1_x86_64 manylinux2014_x86_64)
    for minor in 5 17 24 26 27 28 31 32 34 35 36 39; do platforms+=("manylinux_2_${minor}_x86_64"); done
    for name in "$@"; do
        pin=$(grep -iE "^${name%%==*}==" constraints.txt || true)
        [ "${name#*==}" = "$name" ] || pin=$name
        "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
            "${platforms[@]/#/--platform=}" --dest "$folder" "${pin:-$name}"
    done
}

mkdir -p "$out" "$work/site" "$work/runtime"
# shellcheck disable=SC2086
download "$work/wheels" $packages
core=$(unzip -p "$work"/wheels/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: \(pydantic-core==[0-9.]*\).*/\1/p')
download "$work/wheels" "$core"  # exactly the one that pydantic asks for
for wheel in "$work"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$work/site"; done

download "$work/server" nvidia-pytriton==0.7.0 numpy==1.26.4
"$python" -m zipfile -e "$work"/server/nvidia_pytriton-*.whl "$work/unpacked"
server=pytriton/tritonserver
mkdir -p "$work/runtime/$server" "$work/runtime/backends"
mv "$work/unpacked/nvidia_pytriton.libs" "$work/runtime/"
rm -f "$work"/runtime/nvidia_pytriton.libs/libpython3*  # of another version's stub
mv "$work/unpacked/$server/bin" "$work/runtime/$server/"
mv "$work/unpacked/$server/backends/python" "$work/runtime/backends/"
cp "$work/unpacked/$server/python_backend_stubs/3.12/triton_python_backend_stub" "$work/runtime/backends/python/"
chmod +x "$work/runtime/$server/bin/tritonserver" "$work/runtime/backends/python/triton_python_backend_stub"
"$python" -m zipfile -e "$work"/server/numpy-*.whl "$work/runtime/python/lib/python3.12/site-packages"

for part in runtime site; do
    find "$work/$part" -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +
    tar -C "$work/$part" --owner=0 --group=0 -cJf "$out/$part.txz" .
done
ls -l "$out"
