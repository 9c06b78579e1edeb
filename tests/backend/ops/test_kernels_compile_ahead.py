"""What the launchers would launch, compiled for real devices without one: no spills, no more shared memory than any gives.

A recorder takes the place of each kernel and keeps the arguments; they are specialised as the JIT would (pointers and integers
divisible by 16, None and 1 as constants), compiled for a target, and the machine code is read with triton's own cuobjdump.
"""

import importlib
import os
import re
import subprocess

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from turbotriton.backend.ops.operands import SplitSums

#: Bytes a program: 99 KiB on sm_86 and sm_89, which run what is compiled for sm_80; 227 KiB on sm_90 and sm_100.
SHARED_LIMIT_BYTES = {80: 101376, 90: 232448, 100: 232448}
PACKAGE = "turbotriton.backend.ops.kernels"
MODULES = (
    "rms_norm",
    "rotary_store_kv",
    "silu_and_mul",
    "paged_decode_attention",
    "paged_prefill_attention",
    "skinny_linear",
    "greedy_sample",
    "stage_decode",
    "skinny_qkv",
    "narrow_linear",
)
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
}
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32

# the main shape on every architecture, the largest and oddest tiles once
CASES = [
    (80, BF16, 128), (90, BF16, 128), (100, BF16, 128),
    (90, FP16, 256), (80, FP16, 256), (90, FP16, 80), (90, BF16, 64), (90, FP32, 128), (80, FP32, 256), (90, FP32, 64),
]  # fmt: skip


class Recorder:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(
            (self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs)
        )


def source_of(kernel, arguments):
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


@pytest.fixture
def launches(monkeypatch):
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "TRITON_INTERPRET turns kernels into functions that cannot be compiled"
    recorded = []
    for name in MODULES:
        module = importlib.import_module(f"{PACKAGE}.{name}")
        for attribute in [attribute for attribute in vars(module) if attribute.endswith("_kernel")]:
            monkeypatch.setattr(module, attribute, Recorder(getattr(module, attribute), recorded))
    return recorded


def takes_narrow(capability, dtype):
    """16 bit, and tiles that need the shared memory of a data centre's chip: elsewhere these layers are cuBLAS's."""
    return dtype is not FP32 and capability >= 90


def launch_all(monkeypatch, capability, dtype, head_dim, num_heads=32, num_kv_heads=8, hidden=4096):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    rms_norm, rotary_store_kv, silu_and_mul, attention, prefill, skinny, greedy, stage, skinny_qkv, narrow = (
        importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES
    )
    for module in (rms_norm, rotary_store_kv, silu_and_mul, attention, skinny, greedy, stage, skinny_qkv, narrow):
        monkeypatch.setattr(module, "has_pdl", lambda device: capability >= 90)
    rms_norm.rms_norm(empty(16, hidden), empty(hidden), 1e-5, empty(16, hidden))
    rms_norm.rms_norm(SplitSums(empty(4, 16, hidden, dtype=FP32), dtype), empty(hidden), 1e-5, empty(16, hidden))
    cache, angle = empty(4, num_kv_heads, 64, head_dim), empty(16, head_dim // 2, dtype=FP32)
    qkv, slots = empty(16, (num_heads + 2 * num_kv_heads) * head_dim), empty(16, dtype=torch.int64)
    for x in (qkv, SplitSums(empty(2, *qkv.shape, dtype=FP32), dtype)):
        rotary_store_kv.rotary_store_kv(x, angle, angle, empty(16, dtype=FP32), cache, cache, slots, num_heads, num_kv_heads)
    silu_and_mul.silu_and_mul(empty(16, 2 * 14336))
    for num_sms in (1, 132):  # one split, then several
        monkeypatch.setattr(attention, "num_sms", lambda device, num_sms=num_sms: num_sms)
        tables, lens = empty(16, 128, dtype=torch.int32), empty(16, dtype=torch.int32)
        attention.paged_decode_attention(empty(16, num_heads, head_dim), cache, cache, tables, lens, 0.1)
        for x in (qkv, SplitSums(empty(2, *qkv.shape, dtype=FP32), dtype)):
            attention.rotary_decode_attention(x, angle, angle, None, cache, cache, slots, tables, lens, 0.1)
    monkeypatch.setattr(prefill, "_compute_capability", lambda device: capability)
    monkeypatch.setattr(prefill, "takes_hopper_prefill", lambda *shape: False)  # that kernel has tests of its own
    q, bounds, small_blocks = empty(256, num_heads, head_dim), empty(17, dtype=torch.int32), empty(4, num_kv_heads, 16, head_dim)
    prefill.paged_prefill_attention(q, cache, cache, tables, lens, bounds, 0.1)
    prefill.paged_prefill_attention(q, small_blocks, small_blocks, tables, lens, bounds, 0.1, 4096)
    for num_rows in (1, skinny.MAX_SKINNY_ROWS):
        x, gain, gate_up = empty(num_rows, hidden), empty(hidden), empty(2 * 14336, hidden).t()
        skinny.linear(empty(num_rows, 14336), empty(hidden, 14336).t())
        skinny.norm_linear(x, x, gain, 1e-5, gate_up, empty(2 * 14336))
        skinny.norm_gate_up(x, x, gain, 1e-5, gate_up)
        qkv = empty((num_heads + 2 * num_kv_heads) * head_dim, hidden).t()
        angles = empty(num_rows, head_dim // 2, dtype=FP32)
        skinny_qkv.norm_qkv_rotary_store(x, x, gain, 1e-5, qkv, None, angles, angles, None, cache, cache, slots[:num_rows])
    for num_rows in (8, 64, 128) if takes_narrow(capability, dtype) else ():
        narrow.gate_up(empty(num_rows, hidden), empty(2 * 14336, hidden).t())
        narrow.linear(empty(num_rows, 14336), empty(hidden, 14336).t())
        with monkeypatch.context() as device:
            device.setattr(narrow, "num_sms", lambda device: 132)
            parts = narrow.split_linear(empty(num_rows, 14336), empty(hidden, 14336).t(), empty(hidden))
            assert isinstance(parts, SplitSums)
        if num_rows == 64:
            narrow.linear(empty(num_rows, hidden), empty(128256, hidden).t())  # the head, whose tiles are its own
    bans = empty(17, dtype=torch.int64)
    greedy.greedy_sample(empty(16, 128256), bans, bans)
    stage.stage_decode(bans, bans, lens, tables, empty(16, head_dim // 2, dtype=FP32), 1.0, 64)
    stage.advance_decode(bans, bans, tables, bans)


def resource_usage(cubin, folder):
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}


@pytest.mark.parametrize(("capability", "dtype", "head_dim"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_every_kernel_compiles_without_spills(capability, dtype, head_dim, launches, monkeypatch, tmp_path):
    launch_all(monkeypatch, capability, dtype, head_dim)
    names = [kernel.__name__ for kernel, _ in launches]
    assert names == [
        "_rms_norm_kernel",
        "_rms_norm_kernel",
        "_rotary_store_kv_kernel",
        "_rotary_store_kv_kernel",
        "_silu_and_mul_kernel",
        *["_split_kernel"] * 6,
        "_prefill_kernel",
        "_prefill_kernel",
        *["_linear_kernel", "_norm_linear_kernel", "_norm_linear_kernel", "_norm_qkv_kernel"] * 2,
        *["_narrow_linear_kernel"] * (10 if takes_narrow(capability, dtype) else 0),
        "_tile_maximum_kernel",
        "pick_kernel",
        "_stage_decode_kernel",
        "_advance_decode_kernel",
    ]
    for kernel, arguments in launches:
        options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
        compiled = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", capability, 32), options=options)
        usage = resource_usage(compiled.asm["cubin"], tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{kernel.__name__} spills: {usage}"
        assert compiled.metadata.shared <= SHARED_LIMIT_BYTES[capability], (
            f"{kernel.__name__}: {compiled.metadata.shared} bytes shared"
        )


def launch_attention(attention, batch, head_dim, *, turns):
    """Of 32 heads over 8, with or without rotary in it."""
    cache = torch.empty((4, 8, 64, head_dim), dtype=BF16)
    tables, lens = torch.empty((batch, 128), dtype=torch.int32), torch.empty(batch, dtype=torch.int32)
    if turns:
        parts = SplitSums(torch.empty((2, batch, 48 * head_dim), dtype=FP32), BF16)
        angle, slots = torch.empty((batch, head_dim // 2), dtype=FP32), torch.empty(batch, dtype=torch.int64)
        attention.rotary_decode_attention(parts, angle, angle, None, cache, cache, slots, tables, lens, 0.1)
    else:
        attention.paged_decode_attention(torch.empty((batch, 32, head_dim), dtype=BF16), cache, cache, tables, lens, 0.1)


@pytest.mark.parametrize("turns", [False, True], ids=["", "turns"])
def test_programs_of_the_main_attention_tile_that_are_one_wave_share_a_multiprocessor(turns, launches, monkeypatch, tmp_path):
    """They hide each other's waits: five at least by shared memory and by registers."""
    attention = importlib.import_module(f"{PACKAGE}.paged_decode_attention")
    monkeypatch.setattr(attention, "has_pdl", lambda device: True)
    monkeypatch.setattr(attention, "num_sms", lambda device: 32)  # 128 programs: four a multiprocessor
    launch_attention(attention, 16, 128, turns=turns)
    kernel, arguments = launches[0]
    compiled = triton.compile(
        source_of(kernel, arguments), target=GPUTarget("cuda", 90, 32), options={"num_warps": arguments["num_warps"]}
    )
    assert 5 * compiled.metadata.shared <= SHARED_LIMIT_BYTES[90]
    assert 5 * resource_usage(compiled.asm["cubin"], tmp_path)["REG"] * 32 * arguments["num_warps"] <= 65536


@pytest.mark.parametrize("batch", [2, 8, 16, 20, 32, 40, 64])
def test_no_form_of_attention_that_turns_spills(batch, launches, monkeypatch, tmp_path):
    attention = importlib.import_module(f"{PACKAGE}.paged_decode_attention")
    monkeypatch.setattr(attention, "has_pdl", lambda device: True)
    monkeypatch.setattr(attention, "num_sms", lambda device: 132)
    launch_attention(attention, batch, 128, turns=True)
    ((kernel, arguments),) = launches
    options = {"num_warps": arguments["num_warps"]}
    compiled = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", 90, 32), options=options)
    assert resource_usage(compiled.asm["cubin"], tmp_path)["STACK"] == 0
    before, _, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
    assert "st.global" not in before
    assert after.index("st.global") < after.index("bar.sync") < after.index("cp.async.cg"), (
        "keys are asked for before the new ones are stored"
    )


@pytest.mark.parametrize("turns", [False, True], ids=["", "turns"])
@pytest.mark.parametrize("head_dim", [128, 80])
def test_few_programs_of_attention_ask_for_their_first_keys_before_they_wait(head_dim, turns, launches, monkeypatch, tmp_path):
    attention = importlib.import_module(f"{PACKAGE}.paged_decode_attention")
    monkeypatch.setattr(attention, "has_pdl", lambda device: True)
    monkeypatch.setattr(attention, "num_sms", lambda device: 132)
    for batch in (16, 17):
        launch_attention(attention, batch, head_dim, turns=turns)
    compiled = []
    for kernel, arguments in launches:
        options = {"num_warps": arguments["num_warps"]}
        compiled.append(triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", 90, 32), options=options))
        assert resource_usage(compiled[-1].asm["cubin"], tmp_path)["STACK"] == 0
    early, late = compiled
    before, _, after = early.asm["ptx"].partition("griddepcontrol.wait")
    assert "prefetch.global.L2" in before
    assert "prefetch.global.L2" not in after
    assert "prefetch.global.L2" not in late.asm["ptx"]
