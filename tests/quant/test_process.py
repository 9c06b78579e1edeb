"""Every `turbotriton lite` command as a process of its own, one after the other as a user types them."""

from pathlib import Path

import pytest
from tests.cli.process import turbotriton
from tests.quant.formats import convert

from turbotriton.demo import checkpoint_path


@pytest.mark.slow
def test_the_lite_commands_run_as_processes(tmp_path: Path) -> None:
    workspace = convert(checkpoint_path(), tmp_path / "w")
    options = ("--device", "cpu", "--calib-samples", "2", "--calib-seqlen", "32")
    for command in ("calibrate", "auto_awq", "smooth_quant"):
        run = turbotriton("lite", command, str(checkpoint_path()), "--work-dir", str(tmp_path / command), *options)
        assert run.returncode == 0, run.stderr
        assert str(tmp_path / command) in run.stdout
    run = turbotriton("lite", "kv_qparams", str(tmp_path / "calibrate"), str(workspace))
    assert "3 files" in run.stdout, run.stderr
    text = ("--text", "default", "--num-tokens", "100", "--seqlen", "64", "--device", "cpu")
    run = turbotriton("lite", "report", str(workspace), str(workspace), "--quant-policy", "8", *text)
    assert "top-1 agreement" in run.stdout, run.stderr
