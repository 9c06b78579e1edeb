"""Inline PTX for triton's interpreter, which has none: enough of it to run the kernels over quantised pages as on a GPU.

`pack` consecutive elements of a tensor's last dim are a thread's, as test_kernels_quantized_compile_ahead.py checks of the layouts.
"""

import re
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

INSTRUCTION = re.compile(r"([a-z0-9]+)((?:\.[a-z0-9.]+)?)\s+(.*)")


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    found = np.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    found = np.zeros_like(a)
    for i in range(4):
        which = int(selector) >> 4 * i & 15
        assert which < 8, "signs are not repeated"
        found |= ((b if which & 4 else a) >> np.uint32(8 * (which & 3)) & np.uint32(255)) << np.uint32(8 * i)
    return found


def _halves(words: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    bits = torch.from_numpy(np.ascontiguousarray(words).view(np.int32).astype(np.int64))
    return [(bits >> shift & 0xFFFF).to(torch.int16).view(dtype).double() for shift in (0, 16)]


def _fma_of_pairs(dtype: torch.dtype) -> Any:
    def fma(a: Any, b: Any, c: Any) -> Any:
        low, high = (
            (x * y + z).to(dtype).view(torch.int16).long() & 0xFFFF
            for x, y, z in zip(*(_halves(np.broadcast_to(each, a.shape), dtype) for each in (a, b, c)), strict=True)
        )
        return (high << 16 | low).numpy().astype(np.uint32)

    return fma


def _pair_of_bf16(high: Any, low: Any) -> Any:
    bits = [torch.from_numpy(each.view(np.float32)).bfloat16().view(torch.int16).long() & 0xFFFF for each in (high, low)]
    return (bits[0] << 16 | bits[1]).numpy().astype(np.uint32)


def _of_floats(compute: Any) -> Any:
    def operation(*words: Any) -> Any:
        with np.errstate(over="ignore", divide="ignore"):
            return np.asarray(compute(*(np.asarray(each).view(np.float32) for each in words)), np.float32).view(np.uint32)

    return operation


OPERATIONS = {
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "mov": lambda a: a,
    "lop3": _lop3,
    "prmt": _prmt,
    "fma.rn.f16x2": _fma_of_pairs(torch.float16),
    "fma.rn.bf16x2": _fma_of_pairs(torch.bfloat16),
    "cvt.rn.bf16x2.f32": _pair_of_bf16,
    "mul.f32": _of_floats(np.multiply),
    "add.f32": _of_floats(np.add),
    "rcp": _of_floats(np.reciprocal),
    "ex2": _of_floats(np.exp2),
    "lg2": _of_floats(np.log2),
}


def _constant(operand: str) -> Any:
    return np.uint32(int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0))


def run(assembly: str, inputs: list[np.ndarray[Any, Any]], outputs: list[np.dtype[Any]], pack: int) -> list[np.ndarray[Any, Any]]:
    """inputs: of 32 bits, of one shape, whose last dim `pack` divides. Outputs have that shape."""
    shape = inputs[0].shape
    assert shape[-1] % pack == 0
    registers: dict[str, Any] = {}
    widths = [pack * dtype.itemsize // 4 for dtype in outputs]
    place = sum(widths)
    for array in inputs:
        words = np.ascontiguousarray(array).view(np.uint32).reshape(-1, pack)
        registers |= {f"${place + i}": words[:, i] for i in range(pack)}
        place += pack
    for line in assembly.strip("{} \n").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        found = INSTRUCTION.fullmatch(line.strip())
        assert found, line
        result, *operands = (operand.strip() for operand in found[3].split(","))
        values = [registers[operand] if operand in registers else _constant(operand) for operand in operands]
        operation = OPERATIONS.get(found[1] + found[2]) or OPERATIONS[found[1]]
        registers[result] = operation(*values)
    results, place = [], 0
    for dtype, width in zip(outputs, widths, strict=True):
        words = np.stack([registers[f"${place + i}"] for i in range(width)], axis=1)
        results.append(np.ascontiguousarray(words).view(dtype).reshape(shape))
        place += width
    return results


class _Results:
    def __init__(self, handles: list[TensorHandle]) -> None:
        self.handles = handles

    def get_result(self, index: int) -> TensorHandle:
        return self.handles[index]


def create_inline_asm(
    builder: InterpreterBuilder, assembly: str, constraints: str, values: list[TensorHandle], types: Any, is_pure: bool, pack: int
) -> _Results:
    """Takes the place of InterpreterBuilder.create_inline_asm."""
    scalars = [dtype.scalar for dtype in types]
    names = {"fp16": np.float16, "fp32": np.float32, "int8": np.int8, "int32": np.int32}
    dtypes = [np.dtype(names[str(scalar)]) for scalar in scalars]
    arrays = run(assembly, [value.data for value in values], dtypes, pack)
    return _Results([TensorHandle(array, scalar) for array, scalar in zip(arrays, scalars, strict=True)])
