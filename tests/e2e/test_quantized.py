"""Quantise, convert, serve with tritonserver, chat: every weight format and every KV format, each by the commands a user types."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.quant.formats import COMMANDS, convert, quantise, write_gptq

from turbotriton.cli.main import main
from turbotriton.client import Client
from turbotriton.demo import checkpoint_path

from .server import TritonServer

pytestmark = pytest.mark.e2e

#: Questions of the demo model whose answers are certain enough to survive any format.
QUESTIONS = {"Count from 1 to 5.": "1, 2, 3, 4, 5", "What is 7 plus 8?": "15"}
OPTIONS = {"session_len": "256", "cache_max_entry_count": "16", "device": "cpu"}

Workspace = Callable[[str], Path]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root, made = tmp_path_factory.mktemp("q"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    def make(kind: str) -> Path:
        destination = root / f"{kind}-workspace"
        if kind in COMMANDS:
            checkpoint, options = quantise(kind, root / kind), COMMANDS[kind][1]
        elif kind == "gptq":
            get("awq")
            checkpoint, options = write_gptq(root / "awq", root / kind), ("--model-format", "gptq")
        else:
            checkpoint, options = checkpoint_path(), ()
        return convert(checkpoint, destination, *options, "--doors", "text")

    return get


def ask(repository: Path, **options: str) -> dict[str, str]:
    """The server's whole streamed answer to each question."""
    answers = {}
    with (
        TritonServer(repository / "model_repository", options={**OPTIONS, **options}) as server,
        Client(server.grpc_url) as client,
    ):
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            deltas = list(client.stream(messages=messages, max_tokens=24, temperature=0))
            answers[question] = "".join(delta.text for delta in deltas)
        log = server.log
    assert "Traceback" not in log
    return answers


def check(answers: dict[str, str]) -> None:
    for question, wanted in QUESTIONS.items():
        assert wanted in answers[question], answers


@pytest.mark.parametrize("kind", ["awq", "int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_quantised_weights_answer_through_the_server(workspace: Workspace, kind: str) -> None:
    check(ask(workspace(kind)))


@pytest.mark.parametrize("quant_policy", ["8", *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("4", "16"))])
def test_quantised_kv_answers_through_the_server(workspace: Workspace, quant_policy: str) -> None:
    check(ask(workspace("dense"), quant_policy=quant_policy))


def test_static_scales_answer_through_the_server(workspace: Workspace, tmp_path: Path) -> None:
    work, own = tmp_path / "stats", convert(checkpoint_path(), tmp_path / "w", "--doors", "text")
    calibration = ["--device", "cpu", "--calib-samples", "8", "--calib-seqlen", "128"]
    assert main(["lite", "calibrate", str(checkpoint_path()), "--work-dir", str(work), *calibration]) == 0
    assert main(["lite", "kv_qparams", str(work), str(own)]) == 0
    check(ask(own, quant_policy="4"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "quant_policy"), [("gptq", "0"), ("awq", "4"), ("int8", "8"), ("fp8", "8")])
def test_weights_and_kv_together(workspace: Workspace, kind: str, quant_policy: str) -> None:
    check(ask(workspace(kind), quant_policy=quant_policy))
