"""The examples of the pages that need a server run as they stand, against a real one in the place of the address that they name."""

import json
import re
from pathlib import Path

import httpx
import pytest

from .engine import wait_until
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
    """With as many processes as its section about several starts."""
    *blocks, counting = python_blocks("openai.md")
    assert len(blocks) == 2
    text = (DOCS / "openai.md").read_text(encoding="utf-8")
    (num_workers,) = re.findall(r"serve api_server localhost:8001 --workers (\d+) ", text)
    namespace: dict[str, object] = {}
    with api_server(demo_server.grpc_url, "--workers", num_workers) as url:
        for block in blocks:
            exec(compile(block.replace("http://localhost:23333", url), "openai.md", "exec"), namespace)
        whole, streamed, review, colour = capsys.readouterr().out.splitlines()
        # The page counts itself, too: each process that listens gives it in turn.
        answering = re.compile(r"turbotriton_openai_worker_requests_total\{.*\} [1-9]")
        wait_until(
            lambda: len(answering.findall(httpx.get(f"{url}/metrics").text)) == int(num_workers), "every process to answer"
        )
        num_listed = sum(block.count("models.list()") for block in blocks)
        exec(compile(counting.replace("http://localhost:23333", url), "openai.md", "exec"), {})
        printed = capsys.readouterr().out
    assert whole == streamed
    assert "42" in whole
    assert review.startswith("stars=")
    assert colour in ('"red"', '"blue"')
    assert printed == text.split(counting)[1].split("```text\n")[1].split("```")[0].replace("40", str(40 + num_listed))
