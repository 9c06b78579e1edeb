"""What the markers of `tests/conftest.py` skip: the marked tests, and no others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = """
import pytest

def test_plain(): pass

@pytest.mark.gpu
def test_marked(): pass

@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_part(where): pass
"""


def test_the_marker_skips_and_the_name_of_a_folder_does_not(tmp_path: Path) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "test_gpu.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    outcomes = {line.split("::")[1].split()[0]: line.split()[1] for line in done.stdout.splitlines() if "::" in line}
    assert outcomes == {
        "test_plain": "PASSED",
        "test_marked": "SKIPPED",
        "test_in_part[cpu]": "PASSED",
        "test_in_part[cuda]": "SKIPPED",
    }
