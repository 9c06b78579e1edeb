"""`turbotriton chat` as a process: on a terminal, through a pipe, and what it refuses."""

import os
from pathlib import Path
from typing import Any

import pytest
from tests.cli.process import turbotriton
from tests.client.terminal_driver import CTRL_C, TerminalProgram
from tests.throttle import throttled

from turbotriton.cli.main import main
from turbotriton.demo import checkpoint_path

DEMO = str(checkpoint_path())
QUICK = ["--max-batch-size", "1", "--top-k", "1"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"TURBOTRITON_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def test_each_line_of_a_pipe_is_a_question(environment: dict[str, str]) -> None:
    done = turbotriton("chat", DEMO, *QUICK, stdin="What is 2 + 3?\nSpell cat.\n", environment=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "5" in first
    assert "a" in second
    assert done.stderr.count("tokens/s") == 2
    assert "on cpu" in done.stderr or "on cuda" in done.stderr


def test_a_folder_of_awq_weights_is_a_model_path(environment: dict[str, str], tmp_path: Path) -> None:
    few = ["--device", "cpu", "--calib-samples", "4", "--calib-seqlen", "64"]
    assert main(["lite", "auto_awq", DEMO, "--work-dir", str(tmp_path / "awq"), *few]) == 0
    done = turbotriton("chat", str(tmp_path / "awq"), *QUICK, "--once", "What is 2 + 3?", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "5" in done.stdout


def test_a_terminal_streams_stops_and_forgets(environment: dict[str, str]) -> None:
    long = ["--temperature", "100", "--top-k", "0", "--top-p", "1", "--max-tokens", "1500", "--seed", "7"]  # 1025 tokens
    with TerminalProgram(["chat", "turbomind", DEMO, "--max-batch-size", "1", *long], environment) as terminal:
        terminal.expect(r"2048 tokens, the checkpoint's own template.*/help.*>>> ", timeout_s=120)
        with throttled(terminal.pid, share=0.1):
            terminal.type("Talk\r")
            terminal.expect(r"Talk\n.{20}")
            terminal.type(CTRL_C)
            terminal.expect(r"\[cancelled, \d+ tokens, [\d.]+ tokens/s.*>>> ")
        terminal.type("end\r")
        terminal.expect("has ended.*>>> ")
        terminal.type("exit\r")
        assert terminal.wait() == 0


@pytest.mark.parametrize("form", [["torch"], ["pytorch"], ["turbomind"]])
def test_the_older_forms_choose_the_backend(form: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from turbotriton.backend.pipeline import loading
    from turbotriton.contract.errors import TurbotritonError

    given = []

    def record(*arguments: Any) -> None:
        given.append(arguments)
        raise TurbotritonError("far enough")

    monkeypatch.setattr(loading, "load_pipeline", record)
    assert main(["chat", *form, DEMO, "--session-len", "99"]) == 1
    ((path, options, _),) = given
    assert path == DEMO
    assert options.reference_ops == (form != ["turbomind"])
    assert options.overrides["session_len"] == "99"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DEMO, "--tp", "2"], "tp is 2"),
        ([DEMO, "--adapters", "a=b"], "--adapters is 'a=b'"),
        ([DEMO, "--quant-policy", "8", "--backend", "pytorch"], "--quant-policy is 8"),
        ([DEMO, "--model-format", "hf", "--backend", "pytorch"], "--model-format is hf"),
        ([DEMO, "--model-name", "nosuch"], "'nosuch'.*turbotriton list"),
        ([DEMO, "--chat-template", "{"], "no JSON"),
        ([DEMO, "--chat-template", '{"model_name": "yi"}', "--model-name", "yi"], "give one"),
        ([DEMO, "--cap", "infilling"], "infilling.*codellama"),
        ([DEMO, "--top-p", "2"], "top_p is 2.0"),
        ([DEMO, "--session-len", "1"], "session_len is 1"),
        (["a", "b"], "'a b' is more than one MODEL_PATH"),
        (["torch", DEMO, "--backend", "turbomind"], "--backend is turbomind.*chat torch"),
        (["/no/such/folder"], "/no/such/folder: is no folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    monkeypatch.setenv("TURBOTRITON_CACHE", environment["TURBOTRITON_CACHE"])
    assert main(["chat", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["chat", DEMO, *QUICK, *arguments]) == 0
    return capsys.readouterr().out


def test_a_conversation_that_is_too_long_says_what_to_do(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURBOTRITON_CACHE", environment["TURBOTRITON_CACHE"])
    assert main(["chat", DEMO, *QUICK, "--session-len", "64", "--once", "word " * 200]) == 2
    assert "session_len is 64; type end" in capsys.readouterr().err


def test_templates_and_system_prompts_change_the_prompt(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURBOTRITON_CACHE", environment["TURBOTRITON_CACHE"])
    template = '{"user": "Q: ", "eoh": "\\n", "assistant": "A:", "stop_words": ["\\n"]}'
    said = ask(capsys, "--chat-template", template, "--meta-instruction", "Be brief.", "--no-stream", "--once", "Hi")
    plain = ask(capsys, "--cap", "completion", "--once", "Be brief.Q: Hi\nA:")
    assert said.rstrip("\n") == plain.split("\n")[0]
    own = ask(capsys, "--meta-instruction", "Be brief.", "--once", "Hi")
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert own == ask(capsys, "--cap", "completion", "--once", text)
