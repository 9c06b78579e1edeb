"""A launcher can stand wherever the plain-torch op of its name stands."""

import importlib
import inspect

import pytest

from turbotriton.backend.ops.reference import primitives


@pytest.mark.parametrize("name", primitives.__all__)
def test_launcher_takes_and_returns_what_the_reference_does(name):
    launcher = getattr(importlib.import_module(f"turbotriton.backend.ops.kernels.{name}"), name)
    assert inspect.signature(launcher) == inspect.signature(getattr(primitives, name))
