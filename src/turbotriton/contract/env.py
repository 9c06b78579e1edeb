"""The only place that reads the environment. One function a variable, with its meaning and default."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "cache_dir",
    "chat_template",
    "engine_option",
    "environment",
    "metrics_folder",
    "openai_api_key",
    "python_executable",
    "runtime_dir",
    "site_dirs",
    "ssl_certfile",
    "ssl_keyfile",
    "test_assets_dir",
    "triton_cache_dir",
]

ENGINE_OPTION_PREFIX = "TURBOTRITON_"


def engine_option(name: str) -> str | None:
    """`TURBOTRITON_<NAME>` overrides the config.ini key `name` (session_len, device, ...); None when unset or empty."""
    return os.environ.get(ENGINE_OPTION_PREFIX + name.upper()) or None


def chat_template() -> str | None:
    """TURBOTRITON_CHAT_TEMPLATE: a ChatTemplateConfig as JSON that the text door uses in place of the workspace's template."""
    return os.environ.get("TURBOTRITON_CHAT_TEMPLATE") or None


def site_dirs() -> list[str]:
    """TURBOTRITON_SITE: folders (os.pathsep between) of this package and its dependencies, for stubs that ignore PYTHONPATH."""
    return [part for part in os.environ.get("TURBOTRITON_SITE", "").split(os.pathsep) if part]


def python_executable() -> str | None:
    """TURBOTRITON_PYTHON: the interpreter for the engine process; None lets the launcher find one."""
    return os.environ.get("TURBOTRITON_PYTHON") or None


def runtime_dir() -> Path:
    """TURBOTRITON_RUNTIME_DIR: sockets and locks (mode 0700); default $XDG_RUNTIME_DIR/turbotriton or /tmp/turbotriton-<uid>."""
    explicit = os.environ.get("TURBOTRITON_RUNTIME_DIR")
    if explicit:
        return Path(explicit)
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    return Path(xdg) / "turbotriton" if xdg else Path(f"/tmp/turbotriton-{os.getuid()}")


def cache_dir() -> Path:
    """TURBOTRITON_CACHE: downloaded server runtime and the like; default $XDG_CACHE_HOME/turbotriton or ~/.cache/turbotriton."""
    explicit = os.environ.get("TURBOTRITON_CACHE")
    if explicit:
        return Path(explicit)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "turbotriton"


def triton_cache_dir() -> Path:
    """TRITON_CACHE_DIR: triton's own variable for what it has compiled; default .triton/cache in $TRITON_HOME or the user's home."""
    explicit = os.environ.get("TRITON_CACHE_DIR")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"


def test_assets_dir() -> Path | None:
    """TURBOTRITON_TEST_ASSETS: released configs, tokenizers and small models that some tests read; None when unset."""
    value = os.environ.get("TURBOTRITON_TEST_ASSETS")
    return Path(value) if value else None


def environment() -> dict[str, str]:
    """A copy of the whole environment, for a child process."""
    return dict(os.environ)


def metric_aliases() -> bool:
    """TURBOTRITON_METRIC_ALIASES: 0 leaves out the `vllm:*` and `nv_trt_llm_*` names (another backend may own them); default 1."""
    return os.environ.get("TURBOTRITON_METRIC_ALIASES", "1") != "0"


def openai_api_key() -> str | None:
    """OPENAI_API_KEY: what clients of an OpenAI server send when no key is given; never logged."""
    return os.environ.get("OPENAI_API_KEY") or None


def ssl_keyfile() -> Path | None:
    """SSL_KEYFILE: the OpenAI server's private key with `--ssl`, as in LMDeploy."""
    value = os.environ.get("SSL_KEYFILE")
    return Path(value) if value else None


def ssl_certfile() -> Path | None:
    """SSL_CERTFILE: its certificate."""
    value = os.environ.get("SSL_CERTFILE")
    return Path(value) if value else None


@contextlib.contextmanager
def metrics_folder(path: Path) -> Iterator[None]:
    """PROMETHEUS_MULTIPROC_DIR: where processes that are started meanwhile keep the figures of their common metrics page."""
    before = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(path)
    try:
        yield
    finally:
        del os.environ["PROMETHEUS_MULTIPROC_DIR"]
        if before is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = before
