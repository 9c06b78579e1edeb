"""The doors import `triton_python_backend_utils`, which only a stub has: a fake stands in for it while these tests run."""

import sys
from collections.abc import Iterator

import pytest
from tests.backend.tritonserver import fake_pb_utils

DOORS = "turbotriton.backend.tritonserver"


@pytest.fixture(scope="module", autouse=True)
def _fake_pb_utils() -> Iterator[None]:
    """Tests import door modules inside functions, after this; none that saw the fake outlives the test file."""
    assert "triton_python_backend_utils" not in sys.modules
    sys.modules["triton_python_backend_utils"] = fake_pb_utils
    yield
    del sys.modules["triton_python_backend_utils"]
    for name in [name for name in sys.modules if name == DOORS or name.startswith(f"{DOORS}.")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _no_metrics() -> Iterator[None]:
    fake_pb_utils.MetricFamily.families.clear()
    yield
    fake_pb_utils.MetricFamily.families.clear()
