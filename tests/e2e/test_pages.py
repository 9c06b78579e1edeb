"""The documentation's pages about tutorial and interfaces, run from top to bottom (`tests/pages.py`); web pages in a real Chromium."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.client.browser import chromium
from tests.pages import PORTS, ROOT, PageRun, commands_of
from tests.programs import need_program

from turbotriton.cli.running_server import held_ports
from turbotriton.contract import env

from .browsing import Visitor
from .server import TritonServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]  # a page has many commands, each with a limit of its own


@pytest.fixture(scope="module")
def visitor() -> Iterator[Visitor]:
    with chromium() as browser:
        yield Visitor(browser)


@pytest.fixture
def ports() -> Iterator[dict[int, int]]:
    documented = [port for flags in PORTS.values() for port in flags.values()]
    with held_ports(len(documented)) as held:
        yield dict(zip(documented, held, strict=True))


@pytest.mark.slow
@pytest.mark.browser
def test_the_tutorial(tmp_path: Path, visitor: Visitor, ports: dict[int, int]) -> None:
    """Starts all it needs, with a cache of its own but for the server runtime."""
    _need_curl("tutorial.md")
    cache = tmp_path / "cache"
    cache.mkdir()
    for runtime in env.cache_dir().glob("server-runtime-*"):
        (cache / runtime.name).symlink_to(runtime)
    environment = {"TURBOTRITON_CACHE": str(cache), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with PageRun(tmp_path, ports, visitor, environment) as run:
        run.run(ROOT / "docs" / "tutorial.md")
    assert f"http://127.0.0.1:{ports[6006]}" in visitor.urls


@pytest.mark.parametrize(
    "page", ["bench.md", "grpc.md", pytest.param("lite.md", marks=pytest.mark.slow), "plan.md", "triton_client.md"]
)
def test_a_page_about_an_interface(page: str, tmp_path: Path, ports: dict[int, int], demo_server: TritonServer) -> None:
    _run(page, tmp_path, ports, demo_server)


@pytest.mark.browser
def test_the_page_about_the_chat_page(tmp_path: Path, visitor: Visitor, ports: dict[int, int], demo_server: TritonServer) -> None:
    _run("gradio.md", tmp_path, ports, demo_server, visitor)
    assert f"http://127.0.0.1:{ports[6006]}" in visitor.urls


def _run(page: str, folder: Path, ports: dict[int, int], demo_server: TritonServer, visitor: Visitor | None = None) -> None:
    """With a tritonserver on the bundled model at the documented addresses."""
    ports[8000] = int(demo_server.http_url.rpartition(":")[2])
    ports[8001] = int(demo_server.grpc_url.rpartition(":")[2])
    _need_curl(page)
    with PageRun(folder, ports, visitor) as run:
        run.run(ROOT / "docs" / page)


def _need_curl(page: str) -> None:
    if any(command.startswith("curl ") for command in commands_of(ROOT / "docs" / page)):
        need_program("curl")
