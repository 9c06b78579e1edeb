"""`serve` of LMDeploy's Python API: an OpenAI server in a process of its own, and the client that comes back with it.

    this process ── HTTP ──> `serve api_server` ── gRPC ──> tritonserver ──> engine

The server ends with `close`, with the `with` block, or with this process; its output is in `log_path` until then.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import httpx

from turbotriton.backend.pipeline.options import PytorchEngineConfig, TurbomindEngineConfig, engine_options
from turbotriton.cli.api_server import check_workers
from turbotriton.cli.leftovers import end_with_parent
from turbotriton.cli.running_server import held_ports
from turbotriton.cli.tritonserver import BACKENDS, check_engine_options
from turbotriton.client.api_client import APIClient
from turbotriton.contract import env
from turbotriton.contract.chat_templates import ChatTemplateConfig
from turbotriton.contract.errors import ConfigError, InvalidInputError, ServerError

__all__ = ["ApiServer", "serve"]

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 900.0  # a large model is converted and read from disk once
STOP_TIMEOUT_S = 120.0
LOG_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")
#: Arguments come by standard input: a command line, with its keys, is everybody's to read.
_CHILD = "import json, sys; from turbotriton.cli.main import main; sys.exit(main(json.load(sys.stdin)))"


class ApiServer(APIClient):
    """The client of a server that `serve` started; `close` ends both."""

    def __init__(self, url: str, api_key: str | None, process: "_Process", certificate: Path | None = None) -> None:
        super().__init__(url, api_key, certificate=certificate)
        self._process = process
        weakref.finalize(
            self, self._http.close
        )  # before the process's, which is older: over TLS a server waits for its clients to hang up

    @property
    def log_path(self) -> Path:
        return self._process.log_path

    def close(self) -> None:
        super().close()
        self._process.stop()


def serve(
    model_path: str | os.PathLike[str],
    model_name: str | None = None,
    backend: Literal["turbomind", "pytorch"] = "turbomind",
    backend_config: TurbomindEngineConfig | PytorchEngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    server_name: str = "127.0.0.1",
    server_port: int = 23333,
    log_level: str = "ERROR",
    api_keys: Sequence[str] | str | None = None,
    ssl: bool = False,
    *,
    revision: str | None = None,
    download_dir: str | os.PathLike[str] | None = None,
    workers: int = 0,
) -> ApiServer:
    """Starts an OpenAI server for a workspace, a checkpoint's folder or a hub id, and waits until it answers.

    backend_config None: the engine's options stay as the workspace has them.
    model_name: what a checkpoint is served as; by default the last part of model_path. A workspace brings its own.
    backend 'pytorch', or a PytorchEngineConfig: the reference ops on any device.
    server_port: 0 takes a free one.   ssl: with the files that SSL_KEYFILE and SSL_CERTFILE name.
    workers: processes that answer behind the one port; 0: by the cores, as the command does.
    The first of api_keys is the one that the returned client sends.

    Raises InvalidInputError for a wrong value, ServerError when the server does not come up.
    """
    _check(backend, backend_config, log_level, ssl=ssl)
    check_workers(workers, "workers")
    config = TurbomindEngineConfig() if backend_config is None else backend_config
    if isinstance(config, PytorchEngineConfig):
        backend = "pytorch"
    options = engine_options(config, model_name=model_name, revision=revision, download_dir=download_dir)
    keys = [api_keys] if isinstance(api_keys, str) else list(api_keys or ())
    named = {
        "--server-name": server_name,
        "--log-level": log_level.lower(),
        "--workers": str(workers),
        "--model-name": options.model_name,
        "--model-format": options.model_format,
        "--revision": options.revision,
        "--download-dir": options.download_dir,
        "--backend": backend if backend == "pytorch" else None,
        "--chat-template": None if chat_template_config is None else chat_template_config.to_json(),
    }
    arguments = ["serve", "api_server", os.fspath(model_path), *([] if backend_config is None else _engine_flags(config))]
    arguments += [f"{name}={os.fspath(value)}" for name, value in named.items() if value is not None]
    arguments += ["--ssl"] if ssl else []
    arguments += ["--api-keys", *keys] if keys else []
    with _usable_port(server_name, server_port) as port:
        process = _Process([*arguments[:3], f"--server-port={port}", *arguments[3:]])
        logger.info("starting an OpenAI server for %s, log: %s", model_path, process.log_path)
        host = {"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(server_name, server_name)
        url = f"{'https' if ssl else 'http'}://{host}:{port}"
        try:
            process.wait_answer(url)
            return ApiServer(url, keys[0] if keys else None, process, env.ssl_certfile() if ssl else None)
        except BaseException:
            process.stop()
            raise


def _check(
    backend: str, backend_config: TurbomindEngineConfig | PytorchEngineConfig | None, log_level: str, *, ssl: bool
) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; it must be {' or '.join(BACKENDS)}")
    if backend == "pytorch" and isinstance(backend_config, TurbomindEngineConfig):
        raise ConfigError("backend is 'pytorch' and backend_config a TurbomindEngineConfig; give a PytorchEngineConfig")
    if log_level not in LOG_LEVELS:
        raise ConfigError(f"log_level is {log_level!r}; it must be one of {', '.join(LOG_LEVELS)}")
    if ssl and (env.ssl_keyfile() is None or env.ssl_certfile() is None):
        raise ConfigError("ssl is True; it needs the variables SSL_KEYFILE and SSL_CERTFILE")


def _engine_flags(config: TurbomindEngineConfig | PytorchEngineConfig) -> list[str]:
    """Flags of `serve api_server`. Raises ConfigError."""
    options = engine_options(config)
    values = {name: value for name, value in options.overrides.items() if not name.startswith("max_queued")}
    if options.rope_scaling_factor:
        values["rope_scaling_factor"] = str(options.rope_scaling_factor)
    if options.use_logn_attn:
        values["use_logn_attn"] = "1"
    check_engine_options(values)
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


@contextlib.contextmanager
def _usable_port(host: str, port: int) -> Iterator[int]:
    """The port for a server that is started meanwhile. Raises InvalidInputError."""
    if port == 0:
        with held_ports(1) as (free,):
            yield free
        return
    if not 0 < port < 65536:
        raise InvalidInputError(f"server_port is {port}; it must be from 1 to 65535, or 0 for a free one")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise InvalidInputError(f"{host}:{port} cannot be taken ({error.strerror}); choose another server_port") from None
    yield port


class _Process:
    """`turbotriton <arguments>` in the background; ended at the latest when this interpreter is."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="turbotriton-api-")
        self.log_path = Path(self._folder.name) / "api_server.log"
        is_main = threading.current_thread() is threading.main_thread()  # else the child would end with the thread
        with open(self.log_path, "wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *arguments[:3]],  # the rest of them is for `ps` alone
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is this process's
                preexec_fn=end_with_parent if is_main else None,
            )
        self._finalizer = weakref.finalize(self, _end, self._child, self._folder)
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._child.stdin as stdin:
            stdin.write(json.dumps(arguments).encode())

    def wait_answer(self, url: str) -> None:
        """Raises InvalidInputError or ServerError with the child's own last words when it ends instead."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        with httpx.Client(verify=False, trust_env=False, timeout=5) as http:  # no more than: does it answer?
            while True:
                if self._child.poll() is not None:
                    raise (InvalidInputError if self._child.returncode == 2 else ServerError)(self._last_words())
                if time.monotonic() > deadline:
                    raise ServerError(f"{url} did not answer within {READY_TIMEOUT_S:.0f} s: {self._last_words()}")
                with contextlib.suppress(httpx.HTTPError):
                    http.get(f"{url}/health")
                    return
                time.sleep(0.1)

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        ours = [line for line in said if line.startswith("turbotriton: error: ")]
        return (ours or said or ["the server said nothing"])[-1].removeprefix("turbotriton: error: ")

    def stop(self) -> None:
        self._finalizer()


def _end(child: "subprocess.Popen[bytes]", folder: "tempfile.TemporaryDirectory[str]") -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    folder.cleanup()
