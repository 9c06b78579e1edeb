"""`turbotriton check_env`: what it prints, writes, and calls missing."""

import importlib.metadata
import json
import pickle
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.cli.process import turbotriton

from turbotriton.cli import check_env
from turbotriton.cli.main import main

NAMES = """turbotriton python torch triton transformers gradio fastapi pydantic tritonclient gpus driver nvcc gcc tritonserver missing"""


def test_prints_and_writes_what_the_machine_has(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    done = turbotriton("check_env", "--dump-file", str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert set(NAMES.split()) <= set(found)
    torch_version = importlib.metadata.version("torch")  # the build's tag may stand in torch.__version__ alone
    assert found["torch"] == torch_version
    assert platform.python_version() in found["python"]
    assert f"torch: {torch_version}\n" in done.stdout
    assert "MiB in /dev/shm" in done.stdout
    assert "sample" in found["ops on the reference, CPU"]
    assert len(found["gpus"]) == torch.cuda.device_count()
    if not torch.cuda.is_available():
        assert "missing: a CUDA GPU" in done.stdout


@pytest.mark.parametrize(
    ("suffix", "read"),
    [("yml", lambda path: yaml.safe_load(path.read_text())), ("pkl", lambda path: pickle.loads(path.read_bytes()))],
)
def test_other_dump_formats_hold_the_same(
    tmp_path: Path, suffix: str, read: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"turbotriton": "1", "gpus": ["one", "two"], "missing": ["nothing"]}
    monkeypatch.setattr(check_env, "collect", lambda: found)
    path = tmp_path / f"found.{suffix}"
    assert main(["check_env", "--dump-file", str(path)]) == 0
    assert read(path) == found
    assert "gpus:\n  one\n  two\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["found.txt", "found", "nowhere/found.json"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check_env", "--dump-file", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--dump-file" in line


def test_what_is_missing_is_said_with_its_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = dict.fromkeys(check_env.PACKAGES, "1.0")
    found |= {"gpus": ["one"], "torch CUDA build": "13.0", "gcc": "gcc 12", "tritonserver": "/bin/tritonserver"}
    monkeypatch.setattr(check_env, "MIN_SHARED_MEMORY_BYTES", 0)
    assert check_env.missing(found) == []
    found |= {"gradio": "not found", "gcc": "not found", "tritonserver": "not found: no libpython"}
    monkeypatch.setattr(check_env, "MIN_SHARED_MEMORY_BYTES", 1 << 60)
    lines = check_env.missing(found)
    for wanted in ("gradio: needed for serve gradio", "gcc: needed for the kernels", "no libpython", "--shm-size"):
        assert any(wanted in line for line in lines), wanted
    assert "built without CUDA" in check_env.missing(found | {"gpus": [], "torch CUDA build": "not found"})[1]
