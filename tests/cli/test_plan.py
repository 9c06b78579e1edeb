"""`turbotriton plan` as a process: a checkpoint, a workspace, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from turbotriton.cli.main import main
from turbotriton.cli.plan import match_gpu
from turbotriton.demo import checkpoint_path


def run_plan(*args: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | ({} if path is None else {"PATH": path})
    return subprocess.run(
        [sys.executable, "-m", "turbotriton", "plan", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def test_checkpoint_and_its_workspace_get_the_same_plan(tmp_path: Path) -> None:
    assert main(["convert", "demo", str(checkpoint_path()), "--dst-path", str(tmp_path / "workspace")]) == 0
    args = ("--gpu", "rtx3090", "--session-len", "2048", "--input-len", "64", "--output-len", "64")
    of_checkpoint, of_workspace = run_plan(str(checkpoint_path()), *args), run_plan(str(tmp_path / "workspace"), *args)
    assert of_checkpoint.returncode == 0, of_checkpoint.stderr
    assert of_checkpoint.stdout == of_workspace.stdout
    assert "1 x NVIDIA GeForce RTX 3090, 23.6 GiB each" in of_checkpoint.stdout
    assert "rates from the data sheet" in of_checkpoint.stdout
    assert "decode x 256" in of_checkpoint.stdout


def test_every_choice_changes_the_plan() -> None:
    base = ("--gpu", "h200")
    plain = run_plan(str(checkpoint_path()), *base).stdout
    for more in (
        ("--gpu", "l4"), ("--tp", "2"), ("--quant", "awq"), ("--quant", "w8a8"), ("--quant-policy", "8"), ("--session-len", "64"),
        ("--cache-max-entry-count", "0.5"), ("--input-len", "77"), ("--output-len", "999"),
    ):  # fmt: skip
        done = run_plan(str(checkpoint_path()), *base, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout != plain, more


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["/nowhere", "--gpu", "h200"], "/nowhere"),
        (["MODEL", "--gpu", "h200", "--session-len", "0"], "--session-len is 0"),
        (["MODEL", "--gpu", "h200", "--input-len", "-3"], "--input-len is -3"),
        (["MODEL", "--gpu", "h200", "--cache-max-entry-count", "1.5"], "--cache-max-entry-count is 1.5"),
        (["MODEL", "--gpu", "h200", "--tp", "8"], "--tp is 8"),
        (["MODEL", "--gpu", "voodoo2"], "voodoo2"),
    ],
)
def test_wrong_use_is_one_line(args: list[str], words: str) -> None:
    done = run_plan(*[str(checkpoint_path()) if arg == "MODEL" else arg for arg in args])
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


def test_auto_reads_the_gpu_that_nvidia_smi_names(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "NVIDIA A100-SXM4-40GB, 40960"\n')
    tool.chmod(0o755)
    done = run_plan(str(checkpoint_path()), path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert "NVIDIA A100 40GB" in done.stdout
    tool.unlink()
    absent = run_plan(str(checkpoint_path()), path=str(tmp_path))
    assert (absent.returncode, "finds no GPU here" in absent.stderr) == (2, True)


@pytest.mark.parametrize(
    ("name", "memory_gib", "expected"),
    [
        ("NVIDIA H200", 140, "h200"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100"),
        ("NVIDIA A100-PCIE-40GB", 40, "a100-40"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA L4", 22, "l4"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("NVIDIA GeForce GTX 1080", 8, None),
    ],
)
def test_names_of_nvidia_smi_find_their_row(name: str, memory_gib: float, expected: str | None) -> None:
    assert match_gpu(name, memory_gib) == expected
