"""`python -m turbotriton.backend.engine --weights DIR --socket PATH [--owner-pid N]`: one engine process.

Options come from DIR/config.ini, then from TURBOTRITON_* variables. Doors start it through `launcher.py`; by hand it serves too.
"""

import argparse
import gc
import logging
import os
import signal
import sys
from pathlib import Path

from turbotriton.contract import env
from turbotriton.contract.errors import TurbotritonError

from .engine import load_engine
from .server import EngineServer

__all__ = ["main"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m turbotriton.backend.engine", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder with config.ini and the tensors")
    parser.add_argument("--socket", type=Path, required=True, help="where to listen; its folder must exist")
    parser.add_argument("--owner-pid", type=int, help="leave when this process is gone")
    args = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s engine {os.getpid()} %(levelname)s %(name)s: %(message)s"
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides when the engine leaves
    try:
        server = EngineServer(load_engine(args.weights, env.engine_option), args.socket, args.owner_pid)
    except TurbotritonError as error:
        print(f"turbotriton engine: error: {error}", file=sys.stderr)
        return error.exit_code
    signal.signal(signal.SIGTERM, lambda *_: server.drain())
    gc.collect()
    gc.freeze()  # what is loaded stays: no collection has to walk through it while requests wait
    try:
        code = server.serve()
    except ProcessLookupError:
        print(f"turbotriton engine: error: process {args.owner_pid} (--owner-pid) is gone", file=sys.stderr)
        return 1
    sys.stderr.flush()
    os._exit(code)  # no interpreter teardown under live threads; the kernel frees the device's memory


if __name__ == "__main__":
    sys.exit(main())
