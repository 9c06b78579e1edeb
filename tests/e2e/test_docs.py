"""The examples of the pages that need a server run as they stand, against a real one in the place of the address that they name."""

import json
import re
from pathlib import Path

import pytest

from .openai_server import api_server
from .server import TritonServer

pytestmark = pytest.mark.e2e

DOCS = Path(__file__).resolve().parents[2] / "docs"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_guided_page(demo_server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = python_blocks("guided.md")
    exec(compile(block.replace("localhost:8001", demo_server.grpc_url), "guided.md", "exec"), {})
    *place, choice = capsys.readouterr().out.splitlines()
    assert set(json.loads("".join(place))) == {"city", "warm"}
    assert choice in ("four", "five")


def test_openai_page(demo_server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = python_blocks("openai.md")
    assert len(blocks) == 2
    namespace: dict[str, object] = {}
    with api_server(demo_server.grpc_url) as url:
        for block in blocks:
            exec(compile(block.replace("http://localhost:23333", url), "openai.md", "exec"), namespace)
        whole, streamed, review, colour = capsys.readouterr().out.splitlines()
    assert whole == streamed
    assert "42" in whole
    assert review.startswith("stars=")
    assert colour in ('"red"', '"blue"')
