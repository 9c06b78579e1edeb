"""Every command of the command line runs as a process in some test: the table says in which, and the table is complete."""

import argparse
import ast
import pickle
import re
from pathlib import Path

import pytest
import yaml
from tests.cli.process import turbotriton
from tests.pages import ROOT, commands_of, leaf_commands, parser_of

from turbotriton.cli.main import main
from turbotriton.demo import checkpoint_path

#: Command -> a page whose blocks are run (tests/e2e/test_pages.py), or a test.
RUN_IN = {
    "chat": "docs/tutorial.md",
    "lite auto_awq": "docs/lite.md",
    "lite smooth_quant": "docs/lite.md",
    "lite calibrate": "docs/lite.md",
    "lite kv_qparams": "docs/lite.md",
    "lite report": "docs/lite.md",
    "convert": "docs/tutorial.md",
    "serve tritonserver": "docs/tutorial.md",
    "serve api_server": "docs/tutorial.md",
    "serve api_client": "docs/tutorial.md",
    "serve triton_client": "docs/triton_client.md",
    "serve gradio": "docs/gradio.md",
    "demo": "tests/e2e/test_demo_command.py::test_answers_once_and_leaves_nothing_running",
    "bench": "docs/bench.md",
    "plan": "docs/plan.md",
    "warmup": "tests/cli/test_warmup.py::test_without_a_gpu_it_says_what_is_missing",
    "list": "tests/cli/test_list.py::test_prints_the_template_names_one_a_line",
    "check_env": "tests/cli/test_check_env.py::test_prints_and_writes_what_the_machine_has",
}
RUN_IN |= {
    f"lite {name}": "tests/quant/test_process.py::test_the_lite_commands_run_as_processes"
    for name in ("calibrate", "auto_awq", "smooth_quant", "kv_qparams", "report")
}
COMMANDS = [" ".join(words) for words in leaf_commands()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs_as_a_process_somewhere(command: str) -> None:
    assert command in RUN_IN, f"{command} has no test that runs it; write one, or a step in docs/tutorial.md, and name it here"
    where = RUN_IN[command]
    path, _, test = where.partition("::")
    if not test:
        assert any(re.search(rf"\bturbotriton {command}\b", line) for line in commands_of(ROOT / path)), f"{path}: no {command}"
        pages = (ROOT / "tests/e2e/test_pages.py").read_text(encoding="utf-8")
        assert f'"{Path(path).name}"' in pages, f"{path} is not run by tests/e2e/test_pages.py"
        return
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, where
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert set(command.split()) <= strings, f"{path} does not name {command}"


def test_the_table_has_no_command_that_is_gone() -> None:
    assert sorted(RUN_IN) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_types_and_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in text
    assert text.count("(default: (default") == 0
    for action in parser_of(command)._actions:
        if action.option_strings and action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
            assert action.help, action.option_strings
            if action.type in (int, float):
                kind = {int: "INT", float: "FLOAT"}[action.type]
                assert action.choices or f"{action.option_strings[0]} {action.metavar or kind}" in text
            if isinstance(action.default, (int, float, str)) and "(default" not in action.help:
                assert f"(default: {action.default})" in text, action.option_strings


def test_an_interrupt_while_the_command_line_is_read_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> argparse.ArgumentParser:
        raise KeyboardInterrupt

    monkeypatch.setattr("turbotriton.cli.main.build_parser", interrupted)
    assert main(["list"]) == 130


def test_an_interrupt_during_the_demos_conversion_is_told_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("TURBOTRITON_CACHE", str(tmp_path))
    monkeypatch.setattr("turbotriton.converter.convert.convert_checkpoint", interrupted)
    assert main(["demo"]) == 130


@pytest.mark.parametrize("form", [["chat"], ["chat", "torch"], ["chat", "turbomind"]], ids=" ".join)
def test_each_form_of_chat_answers(form: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = {"TURBOTRITON_CACHE": str(tmp_path_factory.getbasetemp() / "chat-forms")}
    small = ["--max-batch-size", "1", "--session-len", "128", "--cache-max-entry-count", "8", "--top-k", "1"]
    done = turbotriton(*form, str(checkpoint_path()), *small, "--once", "What is 2 + 3?", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "5" in done.stdout
    assert ("reference ops run on the CPU" in done.stderr) == (form[-1] != "torch" and "on cuda" not in done.stderr)


def test_check_env_writes_the_same_to_yaml_and_pickle(tmp_path: Path) -> None:
    readers = {
        "yml": lambda path: yaml.safe_load(path.read_text()),
        "pkl": lambda path: pickle.loads(path.read_bytes()),
    }
    found = {}
    for suffix, read in readers.items():
        path = tmp_path / f"found.{suffix}"
        done = turbotriton("check_env", "--dump-file", str(path))
        assert done.returncode == 0, done.stderr
        assert f"written to {path}" in done.stdout
        found[suffix] = {name: value for name, value in read(path).items() if "free" not in name}
    assert found["yml"] == found["pkl"]
