"""`serve api_server` over https with a certificate made here: by the options, by the variables, and wrong ones refused."""

import os
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.programs import need_program

from turbotriton.client.api_client import APIClient

from .engine import PATIENCE_S
from .openai_server import api_server
from .server import TritonServer

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Key and certificate for 127.0.0.1, which signs itself."""
    need_program("openssl")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=turbotriton", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate


@pytest.mark.parametrize("by", ["options", "variables", "workers"])
def test_clients_that_trust_the_certificate_are_served_and_others_are_not(
    demo_server: TritonServer, files: tuple[Path, Path], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = files
    options = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)]
    if by == "variables":
        monkeypatch.setenv("SSL_KEYFILE", str(key))
        monkeypatch.setenv("SSL_CERTFILE", str(certificate))
        options = ["--ssl"]
    if by == "workers":
        options += ["--workers", "2"]
    with api_server(demo_server.grpc_url, *options, scheme="https") as url:
        context = ssl.create_default_context(cafile=str(certificate))
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", http_client=httpx.Client(verify=context, trust_env=False)
        ) as client:
            chunks = list(client.completions.create(model="demo", prompt="Hello", max_tokens=4, temperature=0, stream=True))
            assert chunks[-1].choices[0].finish_reason == "length"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health", trust_env=False, timeout=PATIENCE_S)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health".replace("https", "http"), trust_env=False, timeout=PATIENCE_S)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        hello: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
        with APIClient(url) as ours, ours.stream(**hello) as stream:
            assert "".join(delta.text for delta in stream)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ssl"], "needs the variables SSL_KEYFILE and SSL_CERTFILE"),
        (["--ssl-keyfile", "KEY"], "belong together"),
        (["--ssl-keyfile", "KEY", "--ssl-certfile", "/none.pem"], "/none.pem: is no file"),
        (["--ssl-keyfile", "KEY", "--ssl-certfile", "KEY"], "no key and certificate that belong together"),
    ],
)
def test_wrong_files_are_one_line(files: tuple[Path, Path], options: list[str], words: str) -> None:
    arguments = [option.replace("KEY", str(files[0])) for option in options]
    environment: dict[str, Any] = {name: value for name, value in os.environ.items() if not name.startswith("SSL_")}
    done = subprocess.run(
        [sys.executable, "-m", "turbotriton", "serve", "api_server", "127.0.0.1:9", *arguments],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
