"""One pipeline over the bundled model for all tests of the folder, with a cache of its own."""

import os
import warnings
from collections.abc import Iterator

import pytest

from turbotriton import Pipeline, pipeline
from turbotriton.demo import checkpoint_path


@pytest.fixture(scope="session")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    before = os.environ.get("TURBOTRITON_CACHE")
    os.environ["TURBOTRITON_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = pipeline(str(checkpoint_path()))
    if before is None:
        del os.environ["TURBOTRITON_CACHE"]
    else:
        os.environ["TURBOTRITON_CACHE"] = before
    with made:
        yield made
