"""The warp-specialised linear layers of a batch of decodes against float64: shares of steps, tails, gates, and the order of launches.

On the CPU in an emulation of its barriers and rings (gluon_emulation.py), compiled ahead for sm_90, and on a GPU. Tolerances as in
test_kernels_narrow_linear.py: fp32 sums, one rounding; gates and ups are rounded before they meet.
"""

import inspect
import subprocess
from typing import NamedTuple

import pytest
import torch
import triton
from tests.backend.ops.gluon_emulation import emulate
from tests.backend.ops.test_kernels_compile_ahead import POINTERS, Recorder, resource_usage
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from turbotriton.backend.ops import triton_column
from turbotriton.backend.ops.kernels import hopper_narrow_linear as module
from turbotriton.backend.ops.kernels.tuning import HopperNarrowConfig, hopper_narrow_config, next_power_of_2
from turbotriton.backend.ops.operands import DenseWeight

BF16, FP16 = torch.bfloat16, torch.float16
KERNEL = "_hopper_narrow_kernel"
#: Two programs of the kernel and what a multiprocessor of sm_90 keeps for each: 228 KiB, 65536 registers.
SHARED_LIMIT_BYTES = (228 << 10) // 2 - 1024
MAX_REGISTERS = 65536 // (2 * 256)


class Case(NamedTuple):
    num_rows: int
    k: int
    n: int
    num_programs: int
    gated: bool = False
    bias: bool = False
    block_n: int = 64
    block_k: int = 64
    num_stages: int = 2
    num_ahead: int = 0


CASES = [
    Case(1, 64, 64, 1),  # one step
    Case(17, 200, 70, 2, bias=True),  # whole tiles; a tail of inputs and of outputs
    Case(20, 8, 33, 1, gated=True, bias=True),  # fewer inputs than a step, gates that reach into the ups
    Case(33, 1000, 130, 7, bias=True, num_stages=3),  # shares that end inside tiles
    Case(64, 1000, 130, 6, bias=True),  # two splits of each tile
    Case(20, 1000, 257, 80),  # a step a program
    Case(20, 1000, 257, 79, gated=True, num_stages=3, num_ahead=2),
    Case(128, 640, 600, 2, num_stages=3, num_ahead=4),  # several tiles and a part of one
    Case(90, 640, 100, 3, gated=True, bias=True, num_ahead=1),
    Case(9, 264, 300, 2, block_n=128, block_k=32),
    Case(40, 520, 300, 5, block_n=256, block_k=128, num_ahead=1),
]


def tensors(case, dtype, device="cpu", seed=0):
    """x of whole 16-byte strides and not contiguous, W, bias or None."""
    generator = torch.Generator().manual_seed(seed)
    columns = 2 * case.n if case.gated else case.n

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    x = randn(case.num_rows, case.k + 8)[:, :-8]
    return x, randn(columns, case.k, scale=case.k**-0.5).t(), randn(columns) if case.bias else None


def function(case):
    return module.gate_up if case.gated else module.linear


def wanted(case, x, weight, bias):
    y = x.double() @ weight.double() + (0 if bias is None else bias.double())
    if not case.gated:
        return y
    gate, up = y.to(x.dtype).double().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def tolerance(case, dtype):
    eps = torch.finfo(dtype).eps
    if case.gated:
        return {"max_error": 8 * eps + 4e-6, "rms_error": 1.5 * eps + 2e-6}
    return {"max_error": 2 * eps + 2e-6, "rms_error": 0.6 * eps + 1e-6}


def config(case):
    block_m = max(next_power_of_2(case.num_rows), 16)
    return HopperNarrowConfig(block_m, case.block_n, case.block_k, case.num_programs, case.num_stages, case.num_ahead)


def run(case, dtype, monkeypatch, *, seed=0):
    """(result, float64 result), emulated."""
    operands = tensors(case, dtype, seed=seed)
    with monkeypatch.context() as patch:
        patch.setattr(module, "hopper_narrow_config", lambda *args, **facts: config(case))
        patch.setattr(module, "has_pdl", lambda device: True)
        emulate(module, KERNEL, patch, seed, early=["weight_desc"])
        return function(case)(*operands), wanted(case, *operands)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_linear_is_the_product_and_gates_are_joined(case, dtype, monkeypatch, assert_close, guarded_outputs):
    assert_close(*run(case, dtype, monkeypatch), **tolerance(case, dtype))


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("num_programs", [1, 2, 3, 5, 13])
def test_rings_go_round_over_the_tiles_of_a_program(num_stages, num_programs, monkeypatch, assert_close):
    for seed, gated in enumerate((False, True)):
        case = Case(18, 584, 260, num_programs, gated=gated, num_stages=num_stages)
        assert_close(*run(case, FP16, monkeypatch, seed=seed), **tolerance(case, FP16))


MISTAKES = {
    "W and x read before they are there": ("_compute", "            mbarrier.wait(full.index(stage), number // NUM_STAGES & 1)\n", ""),
    "tiles freed while they are read": ("_compute", "(number + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=step > first)",
                                        "stage), count=1)"),
    "tiles never freed": ("_compute", ", pred=step > first)", ", pred=False)"),
    "tiles asked for before they are free": ("_fetch", "        mbarrier.wait(free.index(stage), number // NUM_STAGES - 1 & 1)\n", ""),
    "sums used too early": ("_compute", "acc = warpgroup_mma_wait(0, [acc])", "acc = warpgroup_mma_wait(1, [acc])"),
    "another phase": ("_compute", "number // NUM_STAGES & 1)", "number // NUM_STAGES + 1 & 1)"),
    "x before the wait for the kernel before": ("_fetch", "        gdc_wait()\n", ""),
    "results before the wait for the kernel before": ("_compute", "        gdc_wait()\n", "        pass\n"),
    "x known to the engine, but never waited for": ("_fetch", "        mbarrier.wait(touched, 0)\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulation_finds_what_a_kernel_may_not_do(mistake, monkeypatch):
    name, old, new = MISTAKES[mistake]
    source = inspect.getsource(getattr(module, name).fn).removeprefix("@gluon.jit\n")
    assert source.count(old) == 1
    names: dict[str, object] = {}
    exec(source.replace(old, new), dict(vars(module)), names)
    monkeypatch.setattr(getattr(module, name), "fn", names[name])
    case = Case(20, 700, 100, 1)

    def is_found(seed):
        try:
            out, _ = run(case, FP16, monkeypatch, seed=seed)
        except (AssertionError, AttributeError, RuntimeError, TypeError):
            return True
        return bool(out.isnan().any())

    assert any(is_found(seed) for seed in range(20))


def test_no_rows():
    assert module.linear(torch.empty((0, 64), dtype=FP16), torch.empty((32, 64), dtype=FP16).t()).shape == (0, 32)


def test_what_it_takes(monkeypatch):
    x, weight = torch.empty((64, 64), dtype=BF16), torch.empty((32, 64), dtype=BF16).t()
    assert not module.takes(x, weight)  # no GPU
    monkeypatch.setattr(module, "_is_hopper", lambda device: True)
    assert module.takes(x, weight)
    assert module.takes(x[:, :40], weight[:40])
    assert not module.takes(torch.empty((129, 64), dtype=BF16), weight)
    assert not module.takes(x.float(), weight.float())
    assert not module.takes(x, torch.empty((64, 32), dtype=BF16))  # stored by inputs
    assert not module.takes(torch.empty((64, 63), dtype=BF16), torch.empty((32, 63), dtype=BF16).t())
    assert not module.takes(torch.empty((64, 65), dtype=BF16)[:, 1:], weight)
    assert not module.takes(torch.empty(64 * 64 + 1, dtype=BF16)[1:].view(64, 64), weight)


@pytest.mark.parametrize(("max_rows", "expected"), [(0, []), (64, ["linear", "gate_up"])])
def test_the_column_takes_it_up_to_so_many_rows(max_rows, expected, monkeypatch):
    called = []
    monkeypatch.setattr(triton_column, "MAX_HOPPER_NARROW_ROWS", max_rows)
    monkeypatch.setattr(module, "_is_hopper", lambda device: True)
    for name in ("linear", "gate_up"):
        monkeypatch.setattr(module, name, lambda x, weight, bias, name=name: called.append(name) or x @ weight)
    monkeypatch.setattr(triton_column, "rms_norm", lambda x, gain, eps, residual: (x, residual))
    monkeypatch.setattr(triton_column, "silu_and_mul", lambda gate_up: gate_up)
    monkeypatch.setattr(triton_column, "shared_memory_bytes", lambda device: 0)  # the plain kernel takes none
    weight = DenseWeight(torch.randn(64, 64).to(BF16).t(), None)
    for num_rows in (64, 65):
        x = torch.randn(num_rows, 64).to(BF16)
        triton_column.linear(x, weight)
        triton_column.norm_gate_up_silu(x, x, triton_column.NormWeight(x[0], 1e-5), weight)
    assert called == expected


LAYERS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 14336), "down": (14336, 4096), "lm_head": (4096, 128256),
          "small qkv": (2048, 4096), "small o": (2048, 2048), "small gate_up": (2048, 8192), "small down": (8192, 2048),
          "odd": (896, 1152), "tiny": (8, 1)}  # fmt: skip


@pytest.mark.parametrize("num_rows", [1, 17, 48, 64, 128])
@pytest.mark.parametrize("layer", LAYERS)
def test_shares_fill_the_device_and_two_programs_a_multiprocessor(layer, num_rows):
    (k, n), gated = LAYERS[layer], "gate_up" in layer
    chosen = hopper_narrow_config(num_rows, n, k, 132, gated=gated)
    steps = -(-n // chosen.block_n) * -(-k // chosen.block_k)
    tile_bytes = ((2 if gated else 1) * chosen.block_n + chosen.block_m) * chosen.block_k * 2
    assert chosen.block_m >= num_rows
    assert min(steps, 99) <= chosen.num_programs <= min(steps, 2 * 132)
    assert chosen.num_stages >= 2
    assert chosen.num_stages * tile_bytes + 1024 <= SHARED_LIMIT_BYTES
    sums = (2 if gated else 1) * chosen.block_n * chosen.block_m
    assert sums <= 128 * 128  # registers of a thread
    assert 2 * chosen.num_programs * sums <= module.MAX_PARTS


def compiled_for_hopper(dtype, num_rows, k, n, monkeypatch, *, gated, bias=False, chosen=None):
    launches = []
    monkeypatch.setattr(module, KERNEL, Recorder(getattr(module, KERNEL), launches))
    monkeypatch.setattr(module, "num_sms", lambda device: 132)
    monkeypatch.setattr(module, "has_pdl", lambda device: True)
    if chosen is not None:
        monkeypatch.setattr(module, "hopper_narrow_config", lambda *args, **facts: chosen)
    columns = 2 * n if gated else n
    weight = torch.empty((columns, k), dtype=dtype).t()
    added = torch.empty(columns, dtype=dtype) if bias else None
    (module.gate_up if gated else module.linear)(torch.empty((num_rows, k), dtype=dtype), weight, added)
    ((kernel, arguments),) = launches
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{POINTERS[dtype][1:]}{value.block_shape},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            assert parameter.do_not_specialize
            signature[parameter.name] = "i32"
    source = GluonASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": arguments["num_warps"], "maxnreg": arguments["maxnreg"]}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


WIDE = HopperNarrowConfig(128, 64, 64, 132, 3, num_ahead=4)  # as many registers as there are, and parts of sums


@pytest.mark.parametrize(
    ("dtype", "num_rows", "layer", "bias", "chosen"),
    [
        (BF16, 64, "qkv", True, None),
        (FP16, 64, "gate_up", False, None),
        (BF16, 128, "down", False, None),
        (BF16, 128, "gate_up", True, WIDE),
        (FP16, 32, "small o", True, None),
        (BF16, 17, "lm_head", False, None),
    ],
    ids=lambda value: str(value).removeprefix("torch.").split("(")[0],
)
def test_two_programs_have_room_and_nothing_spills(dtype, num_rows, layer, bias, chosen, monkeypatch, tmp_path):
    """Else the next layer's programs come when this one's have ended. And ptxas leaves products as asynchronous as they are."""
    (k, n), gated = LAYERS[layer], "gate_up" in layer
    compiled = compiled_for_hopper(dtype, num_rows, k, n, monkeypatch, gated=gated, bias=bias, chosen=chosen)
    assert compiled.metadata.shared <= SHARED_LIMIT_BYTES
    usage = resource_usage(compiled.asm["cubin"], tmp_path)
    assert usage["REG"] <= MAX_REGISTERS
    assert usage["STACK"] == usage["LOCAL"] == 0
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "o")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "registers" in said
    assert "serialized" not in said


def test_weights_are_asked_for_before_the_wait(monkeypatch):
    """In the order of the machine's text: a weight's tile, x's empty one, the wait, x's first tile."""
    ptx = compiled_for_hopper(BF16, 64, 4096, 4096, monkeypatch, gated=False).asm["ptx"]
    fetching = ptx[ptx.index("cp.async.bulk.tensor") :]
    assert fetching.index("griddepcontrol.wait") > fetching.index("cp.async.bulk.tensor")
    assert ptx.count("griddepcontrol.wait") >= 2
    before, after = fetching[: fetching.index("griddepcontrol.wait")], fetching[fetching.index("griddepcontrol.wait") :]
    assert before.count("cp.async.bulk.tensor") == 2
    assert after.count("cp.async.bulk.tensor") == 3
    assert ptx.count("griddepcontrol.launch_dependents") == 1


GPU_CASES = [
    *CASES,
    Case(64, 4096, 6144, 132, block_n=128, num_stages=4, num_ahead=4),
    Case(64, 4096, 14336, 112, gated=True, block_n=128, block_k=32, num_stages=5),
    Case(128, 14336, 4096, 128, bias=True, block_n=128, num_stages=3),
    Case(31, 14328, 4095, 264, bias=True, block_n=128, num_stages=4, num_ahead=8),
    Case(48, 4096, 14333, 132, gated=True, bias=True, num_stages=4, num_ahead=2),
]


@pytest.fixture
def hopper():
    if not module._is_hopper(torch.device("cuda", 0)):
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_every_shape(case, dtype, monkeypatch, assert_close, guarded_outputs):
    x, weight, bias = tensors(case, dtype, "cuda")
    assert module.takes(x, weight)
    monkeypatch.setattr(module, "hopper_narrow_config", lambda *args, **facts: config(case))
    y = function(case)(x, weight, bias)
    assert_close(y, wanted(case, x, weight, bias), **tolerance(case, dtype))
    assert torch.equal(function(case)(x, weight, bias), y), "the second launch did not find the counters as the first did"


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 31, 33, 48, 64, 65, 96, 127, 128])
@pytest.mark.parametrize("gated", [False, True])
def test_every_number_of_rows(num_rows, gated, assert_close, guarded_outputs):
    """With the tiles that the layer would have; rows past the last hold NaN."""
    case = Case(num_rows, 2048, 3000, 0, gated=gated, bias=True)
    x, weight, bias = tensors(case, BF16, "cuda")
    whole = torch.full((130, 2048), float("nan"), dtype=BF16, device="cuda")
    whole[:num_rows] = x
    y = function(case)(whole[:num_rows], weight, bias)
    assert_close(y, wanted(case, x, weight, bias), **tolerance(case, BF16))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("gated", [False, True])
def test_a_hundred_runs_give_the_same_bits(gated, monkeypatch):
    """A race in the rings or in the sums of parts would show as a difference between runs."""
    case = Case(64, 4096, 4096, 132, gated=gated, num_stages=4, num_ahead=2)
    monkeypatch.setattr(module, "hopper_narrow_config", lambda *args, **facts: config(case))
    x, weight, _ = tensors(case, BF16, "cuda")
    first = function(case)(x, weight)
    assert not first.isnan().any()
    for _ in range(100):
        assert torch.equal(function(case)(x, weight), first)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("num_rows", [17, 64, 128])
@pytest.mark.parametrize(("hidden", "inter"), [(512, 1536), (2048, 8192)])
def test_layers_that_follow_each_other_at_once(num_rows, hidden, inter):
    """Each starts while the one before it runs and must not see its output unfinished: the same bits as with a pause after each."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, device="cuda") * scale).to(BF16)

    bias = (
        torch.cat([torch.full((inter,), 1.28), torch.zeros(inter)]).to(BF16).cuda()
    )  # gates of about 1 keep numbers of their size
    layers = []
    for _ in range(8):
        gate, up = randn(inter, hidden, scale=0.2 * hidden**-0.5), randn(inter, hidden, scale=hidden**-0.5)
        layers.append((torch.cat([gate, up]).t(), randn(hidden, inter, scale=inter**-0.5).t()))

    def chain(x, pause):
        for gate_up, down in layers:
            x = module.gate_up(x, gate_up, bias)
            pause()
            x = module.linear(x, down)
            pause()
        return x

    x, graph = randn(num_rows, hidden), torch.cuda.CUDAGraph()
    paused = chain(x, torch.cuda.synchronize)
    assert 0.1 < paused.float().square().mean() < 10
    with torch.cuda.graph(graph):
        replayed = chain(x, lambda: None)
    for _ in range(20):
        assert torch.equal(chain(x, lambda: None), paused)
        replayed.zero_()
        graph.replay()
        assert torch.equal(replayed, paused)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_a_graph_replays_it_with_other_inputs(assert_close):
    case = Case(40, 4096, 4096, 0)
    x, weight, _ = tensors(case, BF16, "cuda")
    x = x.contiguous()
    module.linear(x, weight)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module.linear(x, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_close(y, wanted(case, x, weight, None), **tolerance(case, BF16))
