"""Machine instructions of a kernel's main loop by execution unit, without a GPU: python -m tests.bench.count_instructions int4 int8

Compiles what the launcher would launch (132 multiprocessors, sm_90) and disassembles it. The main loop is the longest one that
multiplies matrices. Blocks that a forward branch in it skips (masks of a row's last tile, sums rescaled) are counted apart: they seldom
run.

A multiprocessor has four schedulers. Clocks are those that the units of one need for a turn of the loop of one warp, if nothing waits:

    issue   1 an instruction
    alu     2: integers, selects, comparisons, conversions
    fma     1: fp32, pairs of fp16; 2: integer products
    mufu    8
    tensor  4: the dense rate; mma.sync reaches less
    memory  2: loads, stores, shuffles, whose unit the four share

They bound the time from below; waits come on top, and are hidden by other warps: `programs` of them fit by registers.
"""

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tests.backend.ops.test_kernels_compile_ahead import BF16, Recorder, resource_usage, source_of
from triton.backends.compiler import GPUTarget

from turbotriton.backend.ops.operands import QuantizedPages, W4A16Tiles

PACKAGE = "turbotriton.backend.ops.kernels"
NUM_SMS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 132, 32, 8, 128, 64
REGISTERS, MAX_PROGRAMS = 65536, 32  # of a multiprocessor
CLOCKS = {"alu": 2, "fma": 1, "imad": 2, "mufu": 8, "tensor": 4, "memory": 2, "uniform": 1, "other": 1}
UNITS = {
    "tensor": r"[HI]MMA|HGMMA",
    "mufu": r"MUFU|F2I|I2F|FRND|POPC|FLO",
    "imad": r"IMAD",
    "fma": r"FFMA|FMUL|FADD|HFMA2|HMUL2|HADD2",
    "memory": r"LD|ST|ATOM|RED|SHFL|MATCH",
    "uniform": r"U[A-Z]|R2UR|S2UR|VOTEU",
    "other": r"BRA|B[SA][A-Z]+|EXIT|NOP|WARPSYNC|DEPBAR|S2R|CS2R|YIELD|CALL|RET|ACQBULK",
    "alu": r"",
}
LABEL, INSTRUCTION = re.compile(r"^\.(L_x_\d+):"), re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);")


class Loop(NamedTuple):
    usual: Counter[str]  # opcode to how often
    skipped: Counter[str]


def quantized_decode(bits: int, batch: int, context: int) -> None:
    module = importlib.import_module(f"{PACKAGE}.quantized_decode_attention")

    def pages(num_parts: int) -> QuantizedPages:
        shape = (4, NUM_KV_HEADS, BLOCK_SIZE)
        data = torch.empty((*shape, HEAD_DIM * bits // 8), dtype=torch.uint8)
        return QuantizedPages(data, torch.empty((*shape, 2 * num_parts), dtype=BF16), bits)

    q, lens = torch.empty((batch, NUM_HEADS, HEAD_DIM), dtype=BF16), torch.empty(batch, dtype=torch.int32)
    tables = torch.empty((batch, context // BLOCK_SIZE), dtype=torch.int32)
    module.quantized_decode_attention(q, pages(2 if bits == 4 else 1), pages(1), tables, lens, 0.1)


def w4a16(num_rows: int) -> None:
    module = importlib.import_module(f"{PACKAGE}.w4a16_linear")
    k, n = 4096, 6144
    words = torch.empty((n // 16, k // 64, 32, 4), dtype=torch.int32)
    weight = W4A16Tiles(words, torch.empty((k // 128, n), dtype=torch.int32), None, BF16)
    module.w4a16_linear(torch.empty((num_rows, k), dtype=BF16), weight)


KERNELS: dict[str, tuple[str, Callable[[], None]]] = {
    "int4": ("quantized_decode_attention", lambda: quantized_decode(4, 256, 1024)),
    "int4_splits": ("quantized_decode_attention", lambda: quantized_decode(4, 64, 8192)),
    "int8": ("quantized_decode_attention", lambda: quantized_decode(8, 256, 1024)),
    "int8_splits": ("quantized_decode_attention", lambda: quantized_decode(8, 64, 8192)),
    "w4a16_1": ("w4a16_linear", lambda: w4a16(1)),
    "w4a16_64": ("w4a16_linear", lambda: w4a16(64)),
}


@contextmanager
def recorded(module_name: str) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Launches of the module's kernels, as on a GPU with NUM_SMS multiprocessors."""
    module, launches = importlib.import_module(f"{PACKAGE}.{module_name}"), []
    kernels = {name: Recorder(kernel, launches) for name, kernel in vars(module).items() if name.endswith("_kernel")}
    facts = {"has_pdl": lambda device: True, "num_sms": lambda device: NUM_SMS}
    saved = {name: getattr(module, name) for name in (*kernels, *facts) if hasattr(module, name)}
    for name in saved:
        setattr(module, name, (kernels | facts)[name])
    try:
        yield launches
    finally:
        for name, value in saved.items():
            setattr(module, name, value)


def main_loop(sass: str) -> Loop:
    """Of a disassembly by nvdisasm."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := INSTRUCTION.match(line):
            lines.append(instruction[1])
    targets = {i: labels[found[1]] for i, line in enumerate(lines) if (found := re.search(r"BRA.*`\(\.(L_x_\d+)\)", line))}
    loops = [(targets[i], i + 1) for i in targets if targets[i] < i]
    start, end = max(
        (loop for loop in loops if any("MMA" in line for line in lines[slice(*loop)])), key=lambda loop: loop[1] - loop[0]
    )
    ahead = [(i + 1, target) for i, target in targets.items() if start <= i < target <= end]
    usual, skipped = Counter[str](), Counter[str]()
    for i in range(start, end):
        opcode = re.sub(r"^@!?U?P[T\d]+ ", "", lines[i]).split()[0].split(".")[0]
        (skipped if any(a <= i < b for a, b in ahead) else usual)[opcode] += 1
    return Loop(usual, skipped)


def clocks_of(opcodes: Counter[str]) -> dict[str, int]:
    """Of a scheduler, by unit; `fma` includes integer products, which one half of it computes."""
    found = dict.fromkeys(CLOCKS, 0)
    for opcode, count in opcodes.items():
        unit = next(unit for unit, pattern in UNITS.items() if re.match(pattern, opcode))
        found[unit] += CLOCKS[unit] * count
    imad = found.pop("imad")
    found["fma"] = max(imad, found["fma"] + imad // 2)
    return {"issue": opcodes.total()} | found


def count(name: str, overrides: dict[str, int], capability: int) -> dict[str, Any]:
    module_name, launch = KERNELS[name]
    with recorded(module_name) as launches:
        launch()
    kernel, arguments = launches[0]
    arguments |= {"ASM": True} | overrides  # as on a GPU
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
    compiled = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        usage = resource_usage(compiled.asm["cubin"], Path(folder))
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", f"{folder}/kernel.cubin"]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loop = main_loop(sass)
    threads = 32 * arguments["num_warps"]
    programs = min(MAX_PROGRAMS, REGISTERS // (-(-usage["REG"] // 8) * 8 * threads))
    return {
        "kernel": name,
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"],
        "programs": programs,
        "block_n": arguments.get("BLOCK_N"),
        "seldom": loop.skipped.total(),
        "clocks": clocks_of(loop.usual),
        "opcodes": dict(loop.usual.most_common()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", default=list(KERNELS), help=f"of {', '.join(KERNELS)} (default: all)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=N", help="arguments of the kernel, maxnreg=128 for instance"
    )
    parser.add_argument("--capability", type=int, default=90, help="10 * major + minor (default: %(default)s)")
    args = parser.parse_args()
    overrides = {name: int(value) for name, value in (item.split("=") for item in args.set)}
    rows = [count(name, overrides, args.capability) for name in args.kernels]
    print(
        f"{'kernel':>12} {'regs':>5} {'spills':>6} {'programs':>8} {'keys':>5}   clocks of the main loop; instructions that seldom run"
    )
    for row in rows:
        clocks = ", ".join(f"{unit} {value}" for unit, value in row["clocks"].items())
        print(
            f"{row['kernel']:>12} {row['registers']:5} {row['spilled_bytes']:6} {row['programs']:8} {row['block_n'] or '':>5}   "
            f"{clocks}; {row['seldom']}"
        )
        print(" " * 15 + " ".join(f"{opcode} {times}" for opcode, times in row["opcodes"].items()))
    print(json.dumps({"count": "instructions", "triton": triton.__version__, "capability": args.capability, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
