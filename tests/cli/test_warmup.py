"""`turbotriton warmup` as a process where there is no GPU, and what it does with its processes and its mark."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.bench.make_checkpoint import make_checkpoint
from tests.cli.process import turbotriton

from turbotriton.backend.runner import precompile
from turbotriton.backend.runner.cuda_driver import Gpu
from turbotriton.cli.main import main


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    make_checkpoint("tiny", tmp_path / "workspace" / "weights", "fp32", 64)
    return tmp_path / "workspace"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing(workspace: Path) -> None:
    done = turbotriton("warmup", str(workspace))
    assert done.returncode == 2
    assert "compiled on a CUDA GPU" in done.stderr


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As on a machine with a GPU; what its processes would compile is left out."""
    path = tmp_path / "cache" / "turbotriton-0"
    monkeypatch.setattr(precompile, "gpu_to_compile_for", lambda engine: Gpu("a GPU", 1 << 37))
    monkeypatch.setattr(precompile, "mark_path", lambda model, engine, gpu_name: path)
    monkeypatch.setattr(precompile, "num_processes_for", lambda model, engine, free_bytes: 3)
    return path


def start(
    code: str, started: list[tuple[int, dict[str, str]]]
) -> Callable[[Path, int, dict[str, str]], "subprocess.Popen[bytes]"]:
    def start_process(weights: Path, num_processes: int, options: dict[str, str]) -> "subprocess.Popen[bytes]":
        started.append((num_processes, options))
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)

    return start_process


def test_a_process_is_started_with_the_options_and_done_once(
    workspace: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[int, dict[str, str]]] = []
    code = "print(7, flush=True); print('.......', end='')"
    monkeypatch.setattr(precompile, "start_process", start(code, started))
    assert main(["warmup", str(workspace), "--max-batch-size", "8"]) == 0
    assert started == [(3, {"max_batch_size": "8"})]
    assert " 7/7" in capsys.readouterr().err
    assert mark.exists()
    assert main(["warmup", str(workspace), "--max-batch-size", "8"]) == 0
    assert len(started) == 1
    assert "compiled already" in capsys.readouterr().out
    assert main(["warmup", str(workspace), "--max-batch-size", "8", "--force", "--jobs", "1"]) == 0
    assert started[1:] == [(1, {"max_batch_size": "8"})]


def test_a_process_that_fails_leaves_no_mark(
    workspace: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precompile, "start_process", start("raise SystemExit(3)", []))
    assert main(["warmup", str(workspace)]) == 1
    assert "ended with code 3" in capsys.readouterr().err
    assert not mark.exists()


def test_an_end_before_its_time_leaves_no_process(
    workspace: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    code = (
        "import os, time; os.fork()\n"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\n"
        "print('no number', flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(precompile, "start_process", start(code, []))
    with pytest.raises(ValueError, match="invalid literal"):  # as an interrupt would come
        main(["warmup", str(workspace)])
    for pid in pids.read_text().split():
        assert is_gone(int(pid))
    assert not mark.exists()


def is_gone(pid: int) -> bool:
    """Within five seconds; one that has ended and that nobody has waited for is gone, too."""
    for _ in range(500):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_jobs_below_one_are_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", str(workspace), "--jobs", "0"]) == 2
    assert "--jobs is 0" in capsys.readouterr().err
