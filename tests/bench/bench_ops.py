"""Speed of each kernel: GB/s against a measured copy and against plain torch. python tests/bench/bench_ops.py [--sweep]

Method: the calls are captured in a CUDA graph, one after the other over copies of the inputs that together exceed the L2 cache
(256 MiB, at most 64 copies), and the graph is replayed; a sample is one replay divided by its calls. GB/s counts the bytes that
the formula must read and write, nothing that an implementation adds.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from turbotriton.backend.ops.kernels import paged_decode_attention as attention_module
from turbotriton.backend.ops.kernels.paged_decode_attention import paged_decode_attention
from turbotriton.backend.ops.kernels.rms_norm import rms_norm
from turbotriton.backend.ops.kernels.rotary_store_kv import rotary_store_kv

DTYPE = torch.bfloat16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, HIDDEN = 32, 8, 128, 64, 4096  # Llama 3 8B
EXCEED_L2_BYTES = 256 << 20
NUM_SAMPLES = 20


@dataclasses.dataclass(frozen=True)
class Case:
    """`make()` allocates one set of inputs and returns (our call, torch's call)."""

    op: str
    shape: str
    num_bytes: int
    make: Callable[[], tuple[Callable[[], object], Callable[[], object]]]


def sample_us(calls: list[Callable[[], object]]) -> list[float]:
    """Microseconds a call, one value a graph replay, sorted."""
    for call in calls[:1] * 3:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, 16 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    samples = []
    for _ in range(NUM_SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1000 / (repeats * len(calls)))
    return sorted(samples)


def percentile(samples: list[float], share: float) -> float:
    return samples[round(share * (len(samples) - 1))]


def copy_gb_per_s() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(sample_us([lambda: target.copy_(source)])) / 1e3


def randn(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE, device="cuda").normal_()


def norm_case(num_tokens: int) -> Case:
    def make():
        x, residual, weight = randn(num_tokens, HIDDEN), randn(num_tokens, HIDDEN), randn(HIDDEN)

        def by_torch():
            r = x + residual
            return torch.nn.functional.rms_norm(r, (HIDDEN,), weight, 1e-5), r

        return lambda: rms_norm(x, weight, 1e-5, residual), by_torch

    return Case("rms_norm + residual", f"{num_tokens} x {HIDDEN}", 4 * num_tokens * HIDDEN * DTYPE.itemsize, make)


def rotary_case(num_tokens: int) -> Case:
    num_columns = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    num_blocks = -(-num_tokens // BLOCK_SIZE)

    def make():
        qkv, angle = randn(num_tokens, num_columns), torch.rand(num_tokens, HEAD_DIM // 2, device="cuda")
        cos, sin = angle.cos(), angle.sin()
        k_cache, v_cache = (randn(num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in "kv")
        slots = torch.arange(num_tokens, device="cuda")

        def by_torch():
            heads = qkv.view(num_tokens, -1, HEAD_DIM)
            a, b = heads[:, :-NUM_KV_HEADS].float().chunk(2, dim=-1)
            c, s = cos[:, None], sin[:, None]
            rotated = torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(DTYPE)
            k_cache[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = rotated[:, NUM_HEADS:]
            v_cache[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = heads[:, -NUM_KV_HEADS:]
            return rotated[:, :NUM_HEADS]

        return lambda: rotary_store_kv(qkv, cos, sin, None, k_cache, v_cache, slots, NUM_HEADS, NUM_KV_HEADS), by_torch

    num_bytes = num_tokens * (2 * num_columns * DTYPE.itemsize + HEAD_DIM * 4)
    return Case("rotary_store_kv", f"{num_tokens} x {NUM_HEADS}+2*{NUM_KV_HEADS} x {HEAD_DIM}", num_bytes, make)


def attention_case(batch: int, context_len: int) -> Case:
    max_blocks = context_len // BLOCK_SIZE

    def make():
        q = randn(batch, NUM_HEADS, HEAD_DIM)
        k_cache, v_cache = (randn(batch * max_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in "kv")
        tables = torch.randperm(batch * max_blocks, device="cuda").view(batch, max_blocks).int()
        lens = torch.full((batch,), context_len, dtype=torch.int32, device="cuda")
        # torch's gets the same bytes as contiguous keys and values: it pays for no paging
        contiguous = [cache.view(batch, NUM_KV_HEADS, context_len, HEAD_DIM) for cache in (k_cache, v_cache)]

        def by_torch():
            return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], *contiguous, enable_gqa=True)

        return lambda: paged_decode_attention(q, k_cache, v_cache, tables, lens, HEAD_DIM**-0.5), by_torch

    num_bytes = 2 * (batch * context_len * NUM_KV_HEADS + batch * NUM_HEADS) * HEAD_DIM * DTYPE.itemsize
    return Case("paged_decode_attention", f"{batch} x {context_len} keys", num_bytes, make)


CASES = [
    *(norm_case(num_tokens) for num_tokens in (1, 64, 8192)),
    *(rotary_case(num_tokens) for num_tokens in (1, 64, 8192)),
    *(attention_case(*shape) for shape in ((1, 1024), (1, 32768), (8, 4096), (64, 1024), (64, 8192), (256, 2048))),
]


def measure(case: Case, ceiling: float) -> dict[str, object]:
    num_copies = max(1, min(64, -(-EXCEED_L2_BYTES // case.num_bytes)))
    pairs = [case.make() for _ in range(num_copies)]
    ours, torchs = sample_us([pair[0] for pair in pairs]), sample_us([pair[1] for pair in pairs])
    p20, p50, p80 = (percentile(ours, share) for share in (0.2, 0.5, 0.8))
    rate = case.num_bytes / p50 / 1e3
    times = {"p20_us": p20, "p50_us": p50, "p80_us": p80, "gb_per_s": rate, "share_of_copy": rate / ceiling}
    return {"op": case.op, "shape": case.shape} | {
        name: round(value, 3) for name, value in (times | {"torch_p50_us": percentile(torchs, 0.5)}).items()
    }


def sweep() -> None:
    """Attention tiles against each other; the best becomes the rule in tuning.py."""
    chosen = attention_module.decode_attention_config
    cases = [attention_case(*shape) for shape in ((1, 32768), (8, 4096), (64, 8192), (256, 2048))]
    calls = [[case.make()[0] for _ in range(max(1, min(8, -(-EXCEED_L2_BYTES // case.num_bytes))))] for case in cases]
    print(f"\nsweep, GB/s: {'block_n stages warps programs/SM':34}" + "".join(f"{case.shape:>18}" for case in cases))
    for block_n in (32, 64, 128):
        for num_stages in (3, 5, 7):
            for num_warps in (2, 4, 8):
                for programs_per_sm in (2, 4, 8) if (block_n, num_warps) == (64, 4) else (4,):
                    rates = []

                    def config(
                        num_sms,
                        programs_per_sm=programs_per_sm,
                        num_stages=num_stages,
                        block_n=block_n,
                        num_warps=num_warps,
                        **shape,
                    ):
                        base = chosen(num_sms=num_sms * programs_per_sm // 4, **shape)
                        return dataclasses.replace(base, block_n=block_n, num_stages=num_stages, num_warps=num_warps)

                    attention_module.decode_attention_config = config
                    try:
                        rates = [
                            case.num_bytes / statistics.median(sample_us(call)) / 1e3
                            for case, call in zip(cases, calls, strict=True)
                        ]
                    except triton.runtime.errors.OutOfResources as error:
                        print(f"{block_n:>22} {num_stages:>6} {num_warps:>5} {error}")
                        continue
                    print(
                        f"{block_n:>22} {num_stages:>6} {num_warps:>5} {programs_per_sm:>11}"
                        + "".join(f"{rate:18.0f}" for rate in rates)
                    )
    attention_module.decode_attention_config = chosen


def commit() -> str:
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="also time attention tiles and splits against each other")
    arguments = parser.parse_args()
    ceiling = copy_gb_per_s()
    print(f"{torch.cuda.get_device_name()}, copy {ceiling:.0f} GB/s, {DTYPE}")
    print(f"{'op':24}{'shape':>22}{'p50 us':>10}{'GB/s':>8}{'of copy':>9}{'torch us':>10}{'speed-up':>10}")
    rows = []
    for case in CASES:
        row = measure(case, ceiling)
        rows.append(row)
        print(
            f"{row['op']:24}{row['shape']:>22}{row['p50_us']:10.1f}{row['gb_per_s']:8.0f}{row['share_of_copy']:9.0%}"
            f"{row['torch_p50_us']:10.1f}{row['torch_p50_us'] / row['p50_us']:10.2f}",
            flush=True,
        )
        torch.cuda.empty_cache()
    if arguments.sweep:
        sweep()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    device = torch.cuda.get_device_name()
    document = {
        "bench": "ops",
        "gpu": device,
        "copy_gb_per_s": round(ceiling),
        "dtype": str(DTYPE),
        "commit": commit(),
    } | versions
    print(json.dumps(document | {"rows": rows}))


if __name__ == "__main__":
    main()
