"""Speed of each kernel against a measured copy or GEMM and against plain torch. python tests/bench/bench_ops.py [--sweep]

Method: the calls are captured in a CUDA graph, one after the other over copies of the inputs that together exceed the L2 cache
(256 MiB, at most 64 copies), and the graph is replayed; a sample is one replay divided by its calls. GB/s counts the bytes that
the formula must read and write, nothing that an implementation adds. Prefill attention is bound by arithmetic: its TFLOP/s count two
products over the keys that each query sees, and stand against a GEMM of 8192^3. Sampling's torch is the reference op.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch.nn.attention.bias import causal_lower_right

from turbotriton.backend.ops.kernels import paged_decode_attention as attention_module
from turbotriton.backend.ops.kernels import paged_prefill_attention as prefill_module
from turbotriton.backend.ops.kernels.paged_decode_attention import paged_decode_attention
from turbotriton.backend.ops.kernels.paged_prefill_attention import paged_prefill_attention
from turbotriton.backend.ops.kernels.rms_norm import rms_norm
from turbotriton.backend.ops.kernels.rotary_store_kv import rotary_store_kv
from turbotriton.backend.ops.kernels.sample import sample
from turbotriton.backend.ops.kernels.silu_and_mul import silu_and_mul
from turbotriton.backend.ops.operands import SamplingBatch
from turbotriton.backend.ops.reference.sample import sample as reference_sample

DTYPE = torch.bfloat16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, HIDDEN, INTER, VOCAB = 32, 8, 128, 64, 4096, 14336, 128_256  # Llama 3 8B
EXCEED_L2_BYTES = 256 << 20
NUM_SAMPLES = 20


@dataclasses.dataclass(frozen=True)
class Case:
    """`make()` allocates one set of inputs and returns (our call, torch's call)."""

    op: str
    shape: str
    num_bytes: int
    make: Callable[[], tuple[Callable[[], object], Callable[[], object]]]
    num_flops: int = 0  # 0: bound by bytes


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


def gemm_tflop_per_s() -> float:
    a, b = randn(8192, 8192), randn(8192, 8192)
    return 2 * 8192**3 / statistics.median(sample_us([lambda: torch.mm(a, b)])) / 1e6


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


def silu_case(num_tokens: int) -> Case:
    def make():
        x = randn(num_tokens, 2 * INTER)

        def by_torch():
            gate, up = x.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

        return lambda: silu_and_mul(x), by_torch

    return Case("silu_and_mul", f"{num_tokens} x 2*{INTER}", 3 * num_tokens * INTER * DTYPE.itemsize, make)


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


def prefill_case(shape: str, *rows: tuple[int, int]) -> Case:
    """rows: (queries, context) of each."""
    num_tokens = sum(queries for queries, _ in rows)
    max_blocks = max(-(-context // BLOCK_SIZE) for _, context in rows)

    def make():
        q = randn(num_tokens, NUM_HEADS, HEAD_DIM)
        k_cache, v_cache = (randn(len(rows) * max_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in "kv")
        tables = torch.randperm(len(rows) * max_blocks, device="cuda").view(len(rows), max_blocks).int()
        lens = torch.tensor([context for _, context in rows], device="cuda").int()
        bounds = [0, *itertools.accumulate(queries for queries, _ in rows)]
        starts = torch.tensor(bounds, device="cuda").int()
        # torch's gets contiguous tensors, one call a row: it pays for no paging
        separate = [
            (randn(1, NUM_HEADS, queries, HEAD_DIM), *(randn(1, NUM_KV_HEADS, context, HEAD_DIM) for _ in "kv"))
            for queries, context in rows
        ]

        def by_torch():
            return [
                torch.nn.functional.scaled_dot_product_attention(
                    *tensors, attn_mask=causal_lower_right(queries, context), enable_gqa=True
                )
                for tensors, (queries, context) in zip(separate, rows, strict=True)
            ]

        return lambda: paged_prefill_attention(q, k_cache, v_cache, tables, lens, starts, HEAD_DIM**-0.5), by_torch

    num_bytes = 2 * sum(context * NUM_KV_HEADS + queries * NUM_HEADS for queries, context in rows) * HEAD_DIM * DTYPE.itemsize
    pairs = sum(queries * (context - queries) + queries * (queries + 1) // 2 for queries, context in rows)
    return Case("paged_prefill_attention", shape, num_bytes, make, num_flops=4 * HEAD_DIM * NUM_HEADS * pairs)


#: name: (top_k, top_p, has penalties, standard deviation of the logits); 0.1 is what a model of random weights gives
SAMPLE_KINDS = {
    "temperature": (VOCAB, 1.0, False, 3.0),
    "top_k 40": (40, 1.0, False, 3.0),
    "top_p 0.9": (VOCAB, 0.9, False, 3.0),
    "top_p 0.9 flat": (VOCAB, 0.9, False, 0.1),
    "both": (40, 0.9, False, 3.0),
    "both, penalties": (40, 0.9, True, 3.0),
}


def sample_case(num_rows: int, kind: str) -> Case:
    top_k, top_p, has_penalties, deviation = SAMPLE_KINDS[kind]

    def make():
        logits = randn(num_rows, VOCAB) * deviation

        def column(value, dtype=torch.float64):
            return torch.full((num_rows,), value, dtype=dtype, device="cuda")

        penalties = {}
        if has_penalties:
            counts = torch.randint(0, 2, (num_rows, VOCAB), dtype=torch.int32, device="cuda")
            penalties = {f"{name}_penalty": column(1.1) for name in ("repetition", "presence", "frequency")}
            penalties |= {"slots": torch.arange(num_rows, device="cuda"), "output_counts": counts, "seen": counts > 0}
        batch = SamplingBatch(
            temperature=column(0.8),
            top_k=column(top_k, torch.int64),
            top_p=column(top_p),
            min_p=column(0.0),
            uniform=torch.rand(num_rows, dtype=torch.float64, device="cuda"),
            max_top_k=top_k,
            has_top_k=top_k < VOCAB,
            has_top_p=top_k == VOCAB and top_p < 1,
            **penalties,
        )
        return lambda: sample(logits, batch), lambda: reference_sample(logits, batch)

    return Case("sample", f"{num_rows} {kind}", num_rows * VOCAB * (DTYPE.itemsize + 5 * has_penalties), make)


PREFILL_CASES = [
    prefill_case("1 x 512", (512, 512)),
    prefill_case("2 x 4096", (4096, 4096), (4096, 4096)),
    prefill_case("1 x 32768", (32768, 32768)),
    prefill_case("2048 after 30720", (2048, 32768)),
    prefill_case("16 of 64 to 1024", *((64 + 64 * index, 64 + 64 * index) for index in range(16))),
]
CASES = [
    *(norm_case(num_tokens) for num_tokens in (1, 64, 8192)),
    *(rotary_case(num_tokens) for num_tokens in (1, 64, 8192)),
    *(silu_case(num_tokens) for num_tokens in (1, 64, 8192)),
    *(attention_case(*shape) for shape in ((1, 1024), (1, 32768), (8, 4096), (64, 1024), (64, 8192), (256, 2048))),
    *PREFILL_CASES,
    *(sample_case(num_rows, kind) for num_rows in (1, 64, 256) for kind in SAMPLE_KINDS),
]


def measure(case: Case, copy_rate: float, gemm_rate: float) -> dict[str, object]:
    num_copies = max(1, min(64, -(-EXCEED_L2_BYTES // case.num_bytes)))
    pairs = [case.make() for _ in range(num_copies)]
    ours, torchs = sample_us([pair[0] for pair in pairs]), sample_us([pair[1] for pair in pairs])
    p20, p50, p80 = (percentile(ours, share) for share in (0.2, 0.5, 0.8))
    times = {"p20_us": p20, "p50_us": p50, "p80_us": p80}
    if case.num_flops:
        rate = case.num_flops / p50 / 1e6
        times |= {"tflop_per_s": rate, "share_of_gemm": rate / gemm_rate}
    else:
        rate = case.num_bytes / p50 / 1e3
        times |= {"gb_per_s": rate, "share_of_copy": rate / copy_rate}
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


def sweep_prefill() -> None:
    """Tiles of the plain prefill kernel against each other, as `sweep` does for decode."""
    chosen = prefill_module.prefill_attention_config, prefill_module.takes_hopper_prefill
    prefill_module.takes_hopper_prefill = lambda *shape: False
    cases = [PREFILL_CASES[index] for index in (1, 3, 4)]
    calls = [[case.make()[0]] for case in cases]
    print(f"\nsweep, TFLOP/s: {'block_m block_n stages warps':34}" + "".join(f"{case.shape:>18}" for case in cases))
    for block_m, block_n, num_stages, num_warps in itertools.product((64, 128), (32, 64, 128), (3, 4, 5), (4, 8)):
        tile = {"block_m": block_m, "block_n": block_n, "num_stages": num_stages, "num_warps": num_warps}
        prefill_module.prefill_attention_config = lambda *shape, tile=tile: dataclasses.replace(chosen[0](*shape), **tile)
        label = f"{block_m:>23} {block_n:>7} {num_stages:>6} {num_warps:>5}"
        try:
            rates = [case.num_flops / statistics.median(sample_us(call)) / 1e6 for case, call in zip(cases, calls, strict=True)]
        except triton.runtime.errors.OutOfResources as error:
            print(f"{label} {error}")
            continue
        print(f"{label:50}" + "".join(f"{rate:18.0f}" for rate in rates), flush=True)
    prefill_module.prefill_attention_config, prefill_module.takes_hopper_prefill = chosen


def commit() -> str:
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="also time attention tiles and splits against each other; minutes")
    parser.add_argument("--only", default="", help="ops whose names begin so, such as sample")
    arguments = parser.parse_args()
    copy_rate, gemm_rate = copy_gb_per_s(), gemm_tflop_per_s()
    print(f"{torch.cuda.get_device_name()}, copy {copy_rate:.0f} GB/s, GEMM {gemm_rate:.0f} TFLOP/s, {DTYPE}")
    print(f"{'op':24}{'shape':>22}{'p50 us':>10}{'GB/s':>8}{'TFLOP/s':>8}{'of limit':>9}{'torch us':>10}{'speed-up':>10}")
    rows = []
    for case in [case for case in CASES if case.op.startswith(arguments.only)]:
        row = measure(case, copy_rate, gemm_rate)
        rows.append(row)
        print(
            f"{row['op']:24}{row['shape']:>22}{row['p50_us']:10.1f}"
            + (f"{row['gb_per_s']:8.0f}{'':8}{row['share_of_copy']:9.0%}" if "gb_per_s" in row else "")
            + (f"{'':8}{row['tflop_per_s']:8.0f}{row['share_of_gemm']:9.0%}" if "tflop_per_s" in row else "")
            + f"{row['torch_p50_us']:10.1f}{row['torch_p50_us'] / row['p50_us']:10.2f}",
            flush=True,
        )
        torch.cuda.empty_cache()
    if arguments.sweep:
        sweep()
        sweep_prefill()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    device = torch.cuda.get_device_name()
    document = {
        "bench": "ops",
        "gpu": device,
        "copy_gb_per_s": round(copy_rate),
        "gemm_tflop_per_s": round(gemm_rate),
        "dtype": str(DTYPE),
        "commit": commit(),
    } | versions
    print(json.dumps(document | {"rows": rows}))


if __name__ == "__main__":
    main()
