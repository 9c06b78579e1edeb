"""Tensors as they come from a stranger: one value where one is wanted, finite, in range, readable."""

from typing import Any

import numpy as np
import pytest
from tests.backend.tritonserver.fake_pb_utils import Request, strings

from turbotriton.contract.errors import InvalidInputError


def inputs() -> Any:
    from turbotriton.backend.tritonserver import inputs

    return inputs


def test_an_absent_tensor_is_none() -> None:
    request, module = Request({}), inputs()
    assert module.read_int(request, "x", 0, 1) is None
    assert [read(request, "x") for read in (module.read_float, module.read_bool, module.read_string)] == [None] * 3
    assert module.read_strings(request, "x") is None
    assert module.read_array(request, "x") is None


@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
def test_one_value_in_any_shape(shape: tuple[int, ...]) -> None:
    value = inputs().read_int(Request({"x": np.full(shape, 7, dtype=np.int32)}), "x", 0, 9)
    assert value == 7
    assert type(value) is int


@pytest.mark.parametrize("size", [0, 2])
def test_none_or_several_values_are_refused(size: int) -> None:
    module = inputs()
    request = Request({"x": np.zeros((1, size), dtype=np.float32)})
    for read in (lambda: module.read_int(request, "x", 0, 1), lambda: module.read_float(request, "x")):
        with pytest.raises(InvalidInputError, match=f"x has {size} elements; send exactly one"):
            read()


@pytest.mark.parametrize("value", [-1, 11])
def test_an_integer_out_of_range_is_named(value: int) -> None:
    with pytest.raises(InvalidInputError, match=f"x is {value}; it must be from 0 to 10"):
        inputs().read_int(Request({"x": np.array([value], dtype=np.int64)}), "x", 0, 10)


def test_all_64_bits_are_read() -> None:
    assert inputs().read_int(Request({"x": np.array([2**64 - 1], dtype=np.uint64)}), "x", 0, 2**64 - 1) == 2**64 - 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_float_that_is_no_number_is_named(value: float) -> None:
    with pytest.raises(InvalidInputError, match=f"x is {value}; it must be a finite number"):
        inputs().read_float(Request({"x": np.array([value], dtype=np.float32)}), "x")


def test_what_is_read_is_a_copy() -> None:
    source = np.array([[1, 2]], dtype=np.int32)
    read = inputs().read_array(Request({"x": source}), "x")
    source[:] = 9
    assert read.tolist() == [1, 2]


@pytest.mark.parametrize("data", [b"\xff", b"\xc3", b"\xed\xa0\x80"])
def test_text_that_is_no_utf8_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInputError, match="x is no UTF-8 text"):
        inputs().read_string(Request({"x": strings(data)}), "x")


def test_text_is_bounded() -> None:
    module = inputs()
    most = b"a" * module.MAX_TEXT_BYTES
    assert len(module.read_string(Request({"x": strings(most)}), "x")) == module.MAX_TEXT_BYTES
    with pytest.raises(InvalidInputError, match=f"x has {module.MAX_TEXT_BYTES + 1} bytes"):
        module.read_string(Request({"x": strings(most + b"a")}), "x")
