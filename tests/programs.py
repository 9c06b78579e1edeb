"""Programs of the system that some tests call."""

import os
import shutil

import pytest

__all__ = ["need_program"]


def need_program(name: str) -> None:
    """Skips the test where the program is absent; in CI that is a failure."""
    if shutil.which(name) is None:
        if os.environ.get("CI"):
            pytest.fail(f"CI needs the program {name}")
        pytest.skip(f"no {name} on this machine")
