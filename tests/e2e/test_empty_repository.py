"""The literal `model_repository/` folders load, and say what to do."""

from pathlib import Path

import httpx
import pytest

from .engine import PATIENCE_S
from .server import TritonServer

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


def test_empty_repository_loads_and_names_the_remedy() -> None:
    with TritonServer(ROOT / "model_repository") as server:
        reply = httpx.post(f"{server.http_url}/v2/models/text/generate", json={"text_input": "Hello"}, timeout=PATIENCE_S)
        assert reply.status_code in (400, 503)  # 24.10 loses the code of a decoupled model's error: the message begins with it
        assert reply.json()["error"].startswith("UNAVAILABLE: ")
        assert "run 'turbotriton convert'" in reply.json()["error"]
        query = {"inputs": [{"name": "QUERY", "datatype": "BYTES", "shape": [1, 1], "data": ["Hello"]}]}
        reply = httpx.post(f"{server.http_url}/v2/models/preprocessing/infer", json=query, timeout=PATIENCE_S)
        assert "run 'turbotriton convert'" in reply.json()["error"]
