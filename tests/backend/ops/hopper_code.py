"""Gluon kernels compiled ahead for sm_90, and what their machine code holds: for tests without a GPU. And which GPU takes them."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from tests.backend.ops.test_kernels_compile_ahead import POINTERS
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["compiled_for_hopper", "loops_of", "ptxas_report", "skip_unless_hopper"]


def skip_unless_hopper():
    """Of tests marked gpu."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for sm_90")


def compiled_for_hopper(kernel, arguments):
    """The kernel that a launch with these arguments, as a `Recorder` keeps them, would run on sm_90."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor | int) and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attributes)
    options = {name: arguments[name] for name in ("num_warps", "maxnreg") if name in arguments}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def ptxas_report(compiled, folder):
    """What ptxas says of the kernel's registers and spills, and whether it serialises its products."""
    (folder / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(folder / "kernel.ptx"), "-o", str(folder / "o")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def loops_of(compiled, folder):
    """(instructions of the machine code, [(begin, end)] of those that a branch back repeats, the branch last)."""
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    disassembler = Path(triton.knobs.nvidia.cuobjdump.path).parent / "nvdisasm"
    command = [str(disassembler), "-c", str(folder / "kernel.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    place_of_label, code, loops = {}, [], []
    for line in text.splitlines():
        if label := re.match(r"\.(L_x_\d+):", line):
            place_of_label[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
            target = re.search(r"BRA `\(\.(L_x_\d+)\)", instruction[1])
            if target and target[1] in place_of_label:
                loops.append((place_of_label[target[1]], len(code)))
    return code, loops
