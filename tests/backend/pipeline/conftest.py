"""One pipeline over the bundled model for all tests of the folder, converted into a cache of its own."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from turbotriton import Pipeline, TurbomindEngineConfig, pipeline
from turbotriton.demo import checkpoint_path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def pipe(cache: Path) -> Iterator[Pipeline]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("TURBOTRITON_CACHE", str(cache))
        made = pipeline(str(checkpoint_path()), backend_config=TurbomindEngineConfig(max_batch_size=4))
    with made:
        yield made
