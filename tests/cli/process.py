"""`turbotriton ...` as a process."""

import os
import subprocess
import sys
from collections.abc import Mapping


def turbotriton(
    *arguments: str, stdin: str = "", environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "turbotriton", *arguments],
        input=stdin,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
