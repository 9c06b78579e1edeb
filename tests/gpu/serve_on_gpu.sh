#!/usr/bin/env bash
# Runs a command that needs tritonserver on a machine with Python 3.12, torch and no network, out of pack_bundle.sh's folder:
#   bash tests/gpu/serve_on_gpu.sh FOLDER COMMAND...
#   bash tests/gpu/serve_on_gpu.sh .carry python3 tests/bench/bench_serving.py --workspace /dev/shm/1.8b
# The server runtime is unpacked once into TURBOTRITON_CACHE (default: a folder below /tmp), the packages beside it.
set -eu
cd "$(dirname "$0")/../.."
bundle=$(cd "${1:?"usage: serve_on_gpu.sh FOLDER COMMAND..."}" && pwd)
shift
python=${PYTHON:-python3}
export TURBOTRITON_CACHE=${TURBOTRITON_CACHE:-/tmp/turbotriton-bundle}
runtime=$TURBOTRITON_CACHE/server-runtime-0.7.0-py3.12
if [ ! -d "$runtime" ]; then
    mkdir -p "$runtime.new" "$TURBOTRITON_CACHE/site"
    tar -C "$TURBOTRITON_CACHE/site" -xJf "$bundle/site.txz" &
    tar -C "$runtime.new" -xJf "$bundle/runtime.txz"
    "$python" -m venv --symlinks --without-pip "$runtime.new/python"  # around the numpy that the stub can read
    wait $!
    mv "$runtime.new" "$runtime"
fi
export PYTHONPATH=$PWD/src:$TURBOTRITON_CACHE/site${PYTHONPATH:+:$PYTHONPATH}
export TURBOTRITON_SITE=$TURBOTRITON_CACHE/site${TURBOTRITON_SITE:+:$TURBOTRITON_SITE}
export PYTHONUNBUFFERED=1
exec "$@"
