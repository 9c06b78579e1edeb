"""A converted demo workspace and one running server, shared by the end-to-end tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from turbotriton.cli.main import main
from turbotriton.demo import checkpoint_path

from .server import TritonServer


@pytest.fixture(scope="session")
def demo_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo model, converted; text door `demo`."""
    workspace = tmp_path_factory.mktemp("demo") / "workspace"
    assert main(["convert", "demo", str(checkpoint_path()), "--dst-path", str(workspace)]) == 0
    return workspace


@pytest.fixture(scope="module")
def demo_server(demo_workspace: Path) -> Iterator[TritonServer]:
    """A server that a module's tests share; each leaves it as it was."""
    with TritonServer(demo_workspace / "model_repository") as server:
        yield server
