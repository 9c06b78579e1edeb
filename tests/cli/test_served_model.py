"""Options of `serve api_server X` and `serve gradio X`: LMDeploy's, each passed on to the server behind, or refused in one line."""

import argparse
import json
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tests.pages import parser_of

from turbotriton.cli import running_server, tritonserver
from turbotriton.cli.main import build_parser, main
from turbotriton.contract.errors import ServerError
from turbotriton.demo import checkpoint_path

#: Of both commands in LMDeploy v0.3 and v0.4; and api_server's own.
SHARED = [
    *("backend", "trust-remote-code", "meta-instruction", "cap", "adapters", "tp", "model-name", "model-format", "session-len"),
    *("max-batch-size", "cache-max-entry-count", "cache-block-seq-len", "quant-policy", "rope-scaling-factor"),
    *("server-name", "server-port"),
]
OWN = [
    *("allow-origins", "allow-credentials", "allow-methods", "allow-headers", "qos-config-path", "log-level", "api-keys", "ssl"),
    *("chat-template", "num-tokens-per-iter", "max-prefill-iters"),
]
ENGINE = {
    "--session-len": "99", "--max-batch-size": "3", "--cache-max-entry-count": "0.25", "--cache-block-seq-len": "32",
    "--quant-policy": "8", "--rope-scaling-factor": "2.5", "--num-tokens-per-iter": "64", "--backend": "pytorch",
    "--use-logn-attn": "1",
}  # fmt: skip
TEMPLATE = {"--meta-instruction": "Be brief.", "--cap": "completion", "--chat-template": '{"user": "Q: "}'}


@pytest.mark.parametrize("command", ["api_server", "gradio"])
def test_every_option_of_lmdeploy_is_there(command: str) -> None:
    known = {name for action in parser_of(f"serve {command}")._actions for name in action.option_strings}
    wanted = [*SHARED, *(OWN if command == "api_server" else [])]
    assert [name for name in wanted if f"--{name}" not in known] == []


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Flags that `serve tritonserver` is started with, each a start."""
    found: list[dict[str, str]] = []

    def record(workspace: Path, log_path: Path, options: Any) -> NoReturn:
        found.append(dict(option.split("=", 1) for option in options))
        raise ServerError("far enough")

    monkeypatch.setattr(running_server, "running_server", record)
    return found


@pytest.mark.parametrize("command", ["api_server", "gradio"])
@pytest.mark.parametrize("option", [*ENGINE, *TEMPLATE])
def test_engine_and_template_options_reach_the_server_behind(command: str, option: str, started: list[dict[str, str]]) -> None:
    value = {**ENGINE, **TEMPLATE}[option]
    assert main(["serve", command, str(checkpoint_path()), option, value, "--tp", "1", "--max-prefill-iters", "1"]) == 1
    assert started == [{option: value}]
    args = build_parser().parse_args(["serve", "tritonserver", "x", f"{option}={value}"])
    name = option[2:].replace("-", "_")
    options = tritonserver.check_options(args)
    if option in ENGINE:
        assert options == {name: value}
    else:
        field = {"cap": "capability", "chat_template": "user"}.get(name, name)
        assert json.loads(options["chat_template"]) == {field: "Q: " if field == "user" else value}


def test_template_options_go_together() -> None:
    args = build_parser().parse_args(["serve", "tritonserver", "x", *(word for pair in TEMPLATE.items() for word in pair)])
    found = json.loads(tritonserver.check_options(args)["chat_template"])
    assert found == {"user": "Q: ", "meta_instruction": "Be brief.", "capability": "completion"}


@pytest.mark.parametrize("command", ["api_server", "gradio"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "2"], "--tp is 2"),
        (["--adapters", "a=b"], "--adapters is 'a=b'"),
        (["--max-prefill-iters", "4"], "--max-prefill-iters is 4"),
        (["--backend", "jax"], "backend is 'jax'"),
        (["--rope-scaling-factor", "-1"], "rope_scaling_factor is -1"),
        (["--rope-scaling-factor", "nan"], "rope_scaling_factor is nan"),
        (["--use-logn-attn", "2"], "use_logn_attn is 2"),
        (["--session-len", "1"], "session_len is 1"),
        (["--chat-template", "{"], "no JSON"),
        (["--chat-template", '{"model_name": "yi", "capability": "infilling"}'], "infilling"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    command: str, arguments: list[str], message: str, started: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", command, str(checkpoint_path()), *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, line)
    assert not started


@pytest.mark.parametrize("command", ["api_server", "gradio"])
@pytest.mark.parametrize("option", ["--session-len=99", "--meta-instruction=x", "--tp=1", "--max-prefill-iters=1"])
def test_the_address_of_a_server_leaves_no_use_for_them(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", command, "localhost:1", option]) == 2
    assert f"{option.split('=')[0]} is for a model that is served from here" in capsys.readouterr().err


def test_log_level_is_read_in_capitals_too() -> None:
    args: argparse.Namespace = build_parser().parse_args(["serve", "api_server", "x", "--log-level", "ERROR"])
    assert args.log_level == "error"


def test_a_word_that_is_no_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "api_server", "x", "--sesion-len", "5"])
    assert "--sesion-len" in capsys.readouterr().err
