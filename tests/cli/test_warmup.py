"""`turbotriton warmup` as a process where there is no GPU, and what it does with its processes and its mark."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.bench.make_checkpoint import make_checkpoint
from tests.cli.process import turbotriton

from turbotriton.backend.runner import precompile
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
    monkeypatch.setattr(precompile, "mark_path", lambda model, engine: path)
    monkeypatch.setattr(precompile, "num_processes_for", lambda model, engine: 3)
    return path


def start(code: str, started: list[tuple[int, int, dict[str, str]]]):  # type: ignore[no-untyped-def]
    def start_process(weights, share, num_shares, options):  # type: ignore[no-untyped-def]
        started.append((share, num_shares, options))
        return subprocess.Popen([sys.executable, "-c", code, str(share)], stdout=subprocess.PIPE)

    return start_process


def test_every_share_is_started_with_the_options_and_done_once(
    workspace: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[int, int, dict[str, str]]] = []
    monkeypatch.setattr(precompile, "start_process", start("print('...', end='')", started))
    assert main(["warmup", str(workspace), "--max-batch-size", "8"]) == 0
    assert started == [(share, 3, {"max_batch_size": "8"}) for share in range(3)]
    assert " 9/" in capsys.readouterr().err  # three steps of each
    assert mark.exists()
    assert main(["warmup", str(workspace), "--max-batch-size", "8"]) == 0
    assert len(started) == 3
    assert "compiled already" in capsys.readouterr().out
    assert main(["warmup", str(workspace), "--max-batch-size", "8", "--force", "--jobs", "1"]) == 0
    assert started[3:] == [(0, 1, {"max_batch_size": "8"})]


def test_a_process_that_fails_leaves_no_mark_and_no_process(
    workspace: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys, time; sys.exit(3) if sys.argv[1] == '1' else time.sleep(60)"
    monkeypatch.setattr(precompile, "start_process", start(code, []))
    assert main(["warmup", str(workspace)]) == 1
    assert "ended with code 3" in capsys.readouterr().err
    assert not mark.exists()


def test_jobs_below_one_are_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", str(workspace), "--jobs", "0"]) == 2
    assert "--jobs is 0" in capsys.readouterr().err
