"""docs/tutorial.md, from top to bottom, as a newcomer types it; the page in a real Chromium."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from tests.client.browser import ChatPage, chromium
from tests.pages import PORTS, ROOT, PageRun

from turbotriton.cli.running_server import free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.browser]


@pytest.fixture
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def test_every_step_prints_what_the_tutorial_says(tmp_path: Path, browser: Any) -> None:
    documented = [port for flags in PORTS.values() for port in flags.values()]
    visited = []

    def visit(url: str) -> None:
        page = ChatPage(browser, url)
        page.ask("What is 2 + 3?")
        page.wait_status(r"^\s*\d+ tokens")
        expect(page.answers.last).to_contain_text("5")
        assert page.foreign_requests == []
        page.context.close()
        visited.append(url)

    cache = tmp_path / "cache"
    cache.mkdir()
    environment = {"TURBOTRITON_CACHE": str(cache), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    from turbotriton.contract import env

    for runtime in env.cache_dir().glob("server-runtime-*"):
        (cache / runtime.name).symlink_to(runtime)
    ports = dict(zip(documented, free_ports(len(documented)), strict=True))
    with PageRun(tmp_path, ports, visit, environment) as run:
        run.run(ROOT / "docs" / "tutorial.md")
    assert len(visited) == 1
