"""The examples of the pages that need a server run as they stand, against a real one in the place of the address that they name."""

import re
from pathlib import Path

import pytest

from .server import TritonServer

pytestmark = pytest.mark.e2e

DOCS = Path(__file__).resolve().parents[2] / "docs"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_guided_page(demo_server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = python_blocks("guided.md")
    exec(compile(block.replace("localhost:8001", demo_server.grpc_url), "guided.md", "exec"), {})
    answers = capsys.readouterr().out.splitlines()
    assert answers[-1] in ("four", "five")
    assert "city" in answers[0]
