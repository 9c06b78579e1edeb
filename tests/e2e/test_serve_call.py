"""`turbotriton.serve` and `turbotriton.client`: an OpenAI server for as long as its client is open."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.programs import need_program

import turbotriton
from turbotriton import (
    APIClient,
    ApiServer,
    ChatTemplateConfig,
    PytorchEngineConfig,
    TurbomindEngineConfig,
    client,
    serve,
)
from turbotriton.cli.running_server import held_ports
from turbotriton.contract.errors import InvalidInputError, UnavailableError
from turbotriton.demo import checkpoint_path

from .openai_server import api_server

pytestmark = pytest.mark.e2e

SUM = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    config = TurbomindEngineConfig(session_len=256, max_batch_size=4)
    keys = ["first", "second-key-of-sums"]
    with serve(checkpoint_path(), model_name="sums", backend_config=config, server_port=0, api_keys=keys, workers=2) as made:
        yield made
        log_path = made.log_path
        assert log_path.is_file()
    assert not log_path.exists()
    with pytest.raises(UnavailableError), client(made.url, "first") as late:
        _ = late.available_models


def test_answers_under_the_name_and_with_the_engine_options_given(server: ApiServer) -> None:
    assert server.available_models == ["sums"]
    (answer,) = server.chat_completions_v1("sums", SUM, temperature=0)
    assert "5" in answer["choices"][0]["message"]["content"]
    with pytest.raises(InvalidInputError, match="256"):
        list(server.completions_v1("sums", "word " * 300))


def test_backend_and_chat_template_are_those_asked_for() -> None:
    """The prompt is the text alone; the engine says which ops it runs."""
    template = ChatTemplateConfig(user="", assistant="", meta_instruction="One two three")
    with serve(
        checkpoint_path(), backend_config=PytorchEngineConfig(session_len=128), chat_template_config=template, server_port=0
    ) as made:
        ids, _ = made.encode("One two threefour")
        (answer,) = made.chat_completions_v1(made.model, [{"role": "user", "content": "four"}], temperature=0, max_tokens=2)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        with pytest.raises(InvalidInputError, match="128"):
            list(made.completions_v1(made.model, "word " * 300))


def test_another_client_needs_one_of_the_keys(server: ApiServer) -> None:
    with client(server.url, "second-key-of-sums") as other:
        pieces = [text for text, _, _ in other.chat("What is 2 + 3?", 7, stream=True, temperature=0)]
        assert "5" in "".join(pieces)
        other.end_session(7)
    with turbotriton.client(server.url) as stranger, pytest.raises(InvalidInputError, match="api key"):
        _ = stranger.available_models


def test_no_key_is_on_a_command_line(server: ApiServer) -> None:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # of a process that has ended meanwhile
            lines.append(path.read_bytes())
    assert any(b"api_server" in line and str(checkpoint_path()).encode() in line for line in lines)
    assert not any(b"second-key-of-sums" in line for line in lines)


def test_a_taken_port_is_named(server: ApiServer) -> None:
    with pytest.raises(InvalidInputError, match="cannot be taken"):
        serve(checkpoint_path(), server_port=int(server.url.rpartition(":")[2]))


def test_a_program_that_ends_ends_its_server(demo_workspace: Path, certificate: tuple[Path, Path]) -> None:
    """Over https: the client that comes back trusts the certificate that the server was given."""
    code = f"import turbotriton; s = turbotriton.serve({str(demo_workspace)!r}, server_port=0, ssl=True); print(s.url, s.model)"
    key, cert = (str(path) for path in certificate)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SSL_KEYFILE": key, "SSL_CERTFILE": cert}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    url, model = done.stdout.split()
    assert (url.partition(":")[0], model) == ("https", "demo")
    with APIClient(url, certificate=certificate[1]) as late, pytest.raises(UnavailableError, match="refused"):
        _ = late.available_models


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Key and self-signed certificate for 127.0.0.1."""
    need_program("openssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, capture_output=True, check=True)
    return key, cert


@pytest.mark.slow
def test_an_idle_client_does_not_hold_up_the_stop_of_an_https_server(certificate: tuple[Path, Path]) -> None:
    key, cert = certificate
    files = ["--ssl-keyfile", str(key), "--ssl-certfile", str(cert)]
    with held_ports(1) as (free,), api_server(f"127.0.0.1:{free}", *files, scheme="https") as url:  # no tritonserver is there
        idle = APIClient(url, certificate=cert)
        with pytest.raises(UnavailableError):
            _ = idle.available_models
        began = time.monotonic()
    assert time.monotonic() - began < 20
    idle.close()


@pytest.mark.parametrize(
    ("model_path", "options", "message"),
    [
        ("/no/such/folder", {}, "/no/such/folder: is no folder"),
        (None, {"backend": "torch"}, "backend is 'torch'"),
        (None, {"backend": "pytorch", "backend_config": TurbomindEngineConfig()}, "backend is 'pytorch' and backend_config"),
        (None, {"backend_config": TurbomindEngineConfig(session_len=1)}, "session_len is 1"),
        (None, {"chat_template_config": ChatTemplateConfig(capability="infilling", user="x")}, "infilling"),
        (None, {"model_name": "turbomind"}, "'turbomind'"),
        (None, {"revision": "v2"}, "revision is 'v2'"),
        (None, {"server_port": 70000}, "server_port is 70000"),
        (None, {"log_level": "LOUD"}, "log_level is 'LOUD'"),
        (None, {"ssl": True}, "SSL_KEYFILE"),
        (None, {"workers": -1}, "workers is -1"),
    ],
)
def test_what_cannot_be_served_is_one_line(model_path: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        serve(model_path or checkpoint_path(), **{"server_port": 0, **options})
    assert "\n" not in str(caught.value)
