"""Each test of a client gets a fake tritonserver of its own."""

from collections.abc import Iterator

import pytest
from tests.client.fake_server import FakeTriton


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with FakeTriton() as server:
        yield server
