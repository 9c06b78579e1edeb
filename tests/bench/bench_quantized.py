"""Speed of the kernels over 8 and 4 bit numbers, at the shape of Llama 3 8B: python tests/bench/bench_quantized.py [--sweep]

    linear    the four products of a layer at 64 to 8192 rows: torch bf16, int8 (ours; torch._int_mm without scales), FP8 (ours; cuBLAS's)
    rows      what makes 8 bit rows: alone, with RMSNorm, with SiLU
    decode    attention of one query over int8 and int4 pages: bytes a second, beside the dense kernel
    prefill   attention of 16 x 4096 over int8 and int4 pages, beside the dense kernel
    store     rotary and write of keys and values, beside the dense kernel

Method as in bench_ops.py: calls over inputs that together exceed the L2 cache, captured in one CUDA graph; medians. Bytes are those that
the formula must read and write; shares are of --bandwidth GB/s, 4,620 being what kernels reach on an H200. --sweep also times the tiles of
linear and decode against each other; the best become the rules in tuning.py.
"""
# ruff: noqa: B023 (every closure is called before the loop goes on)

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial

import compile_ahead
import torch
import triton
from bench_ops import BLOCK_SIZE, HEAD_DIM, HIDDEN, INTER, NUM_HEADS, NUM_KV_HEADS, commit, randn, sample_us

from turbotriton.backend.ops.kernels import quantized_decode_attention as decode_module
from turbotriton.backend.ops.kernels import w8a8_linear as linear_module
from turbotriton.backend.ops.kernels.paged_decode_attention import paged_decode_attention
from turbotriton.backend.ops.kernels.paged_prefill_attention import paged_prefill_attention
from turbotriton.backend.ops.kernels.quantize_rows import quantize_rows, rms_norm_rows, silu_and_mul_rows
from turbotriton.backend.ops.kernels.quantized_decode_attention import quantized_decode_attention
from turbotriton.backend.ops.kernels.quantized_prefill_attention import quantized_prefill_attention
from turbotriton.backend.ops.kernels.rotary_store_kv import rotary_store_kv
from turbotriton.backend.ops.kernels.rotary_store_quantized_kv import rotary_store_quantized_kv
from turbotriton.backend.ops.kernels.tuning import MAX_PARTS
from turbotriton.backend.ops.operands import Fp8Weight, QuantizedPages, W8A8Weight

QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
LINEARS = {"qkv": (HIDDEN, QKV), "o": (HIDDEN, HIDDEN), "gate_up": (HIDDEN, 2 * INTER), "down": (INTER, HIDDEN)}
ROWS = (64, 256, 4096, 8192)
DECODES = ((64, 1024), (256, 1024), (64, 8192))
EXCEED_L2_BYTES = 256 << 20
Weight = W8A8Weight | Fp8Weight


def median_us(calls: list[Callable[[], object]]) -> float:
    if compile_ahead.compiles(calls):
        return 1.0
    return statistics.median(sample_us(calls))


def num_copies(num_bytes: int) -> int:
    return max(1, min(32, -(-EXCEED_L2_BYTES // num_bytes)))


def weight_of(k: int, n: int, dtype: torch.dtype) -> Weight:
    scale = torch.full((n,), 1 / (k * 40.0), device="cuda")
    if dtype is torch.int8:
        return W8A8Weight(torch.randint(-127, 128, (n, k), dtype=dtype, device="cuda").t(), scale)
    return Fp8Weight((randn(n, k) * 60).to(dtype).t(), scale)


def linear_calls(rows: int, k: int, n: int, dtype: torch.dtype, function: Callable[..., object]) -> list[Callable[[], object]]:
    x = quantize_rows(randn(rows, k), dtype)
    return [partial(function, x, weight_of(k, n, dtype)) for _ in range(num_copies(k * n))]


def int_mm(x: object, weight: Weight) -> object:
    return torch._int_mm(x.values, weight.weight)  # type: ignore[attr-defined]


def linears() -> list[dict[str, object]]:
    names = ("bf16 us", "int8", "plain", "_int_mm", "fp8 ours", "cuBLAS")
    print(f"\n{'rows':>6} {'product':>8} {' '.join(f'{name:>8}' for name in names)}   TFLOP/s int8, fp8; gain")
    found = []
    for rows in ROWS:
        totals = dict.fromkeys(("bf16", "int8", "int8_plain", "int_mm", "fp8_ours", "fp8"), 0.0)
        for name, (k, n) in LINEARS.items():
            x = randn(rows, k)
            weights = [randn(n, k).t() for _ in range(num_copies(2 * k * n))]
            us = {"bf16": median_us([lambda w=w: x @ w for w in weights])}
            del weights
            us["int8"] = median_us(linear_calls(rows, k, n, torch.int8, linear_module.w8a8_linear))
            us["int8_plain"] = median_us(linear_calls(rows, k, n, torch.int8, linear_module._linear))
            us["int_mm"] = median_us(linear_calls(rows, k, n, torch.int8, int_mm))
            us["fp8_ours"] = median_us(linear_calls(rows, k, n, torch.float8_e4m3fn, linear_module._linear))
            most, linear_module.MAX_OWN_FP8_ROWS = linear_module.MAX_OWN_FP8_ROWS, 0
            us["fp8"] = median_us(linear_calls(rows, k, n, torch.float8_e4m3fn, linear_module.w8a8_linear))
            linear_module.MAX_OWN_FP8_ROWS = most
            tflop = 2 * rows * k * n / 1e6
            totals = {kind: total + us[kind] for kind, total in totals.items()}
            gain = (
                f"{tflop / us['int8']:.0f} {tflop / us['fp8']:.0f};  {us['bf16'] / us['int8']:.2f}x {us['bf16'] / us['fp8']:.2f}x"
            )
            print(f"{rows:6} {name:>8} {' '.join(f'{value:8.1f}' for value in us.values())}   {gain}", flush=True)
            found.append({"op": "linear", "rows": rows, "product": name} | {kind: round(value, 2) for kind, value in us.items()})
            torch.cuda.empty_cache()
        print(f"{rows:6} {'layer':>8} " + " ".join(f"{total:8.1f}" for total in totals.values()), flush=True)
    return found


TILES = [
    # block_m, block_n, block_k, warps, stages
    (128, 256, 128, 8, 4), (128, 256, 128, 8, 3), (128, 128, 128, 8, 4), (128, 128, 128, 4, 3), (128, 128, 128, 4, 4),
    (256, 128, 128, 8, 4), (64, 256, 128, 4, 4), (64, 128, 128, 4, 4), (64, 128, 128, 4, 6), (128, 128, 256, 8, 3),
    (128, 256, 64, 8, 6), (64, 64, 256, 4, 4),
]  # fmt: skip


def sweep_linears(dtype: torch.dtype, all_rows: tuple[int, ...]) -> None:
    chosen = linear_module.w8a8_linear_config
    for rows, (name, (k, n)) in itertools.product(all_rows, LINEARS.items()):
        calls = linear_calls(rows, k, n, dtype, linear_module._linear)
        base = chosen(rows, n, k, 132, has_descriptors=True)
        found = [
            (median_us(calls), base),
            (median_us_with(calls, dataclasses.replace(base, descriptors=False)), "no descriptors"),
        ]
        for (block_m, block_n, block_k, warps, stages), splits in itertools.product(TILES, (1, 2, 4) if rows <= 256 else (1,)):
            parts = splits * -(-n // block_n) * -(-rows // block_m) * block_m * block_n
            if block_m >= 2 * rows or (splits > 1 and parts > MAX_PARTS):
                continue
            tile = {"block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps, "num_stages": stages}
            config = dataclasses.replace(base, num_splits=splits, **tile)
            found.append((median_us_with(calls, config), config))
        found.sort(key=lambda entry: entry[0])
        best = "; ".join(
            f"{us:.1f} us {config if isinstance(config, str) else dataclasses.astuple(config)}" for us, config in found[:5]
        )
        print(f"{dtype} {name} {rows} x {k} x {n}: now {median_us(calls):.1f} us; {best}", flush=True)
        del calls
        torch.cuda.empty_cache()


def median_us_with(calls: list[Callable[[], object]], config: object) -> float:
    """Infinite where the tile does not fit the chip."""
    chosen = linear_module.w8a8_linear_config
    linear_module.w8a8_linear_config = lambda *args, **kwargs: config
    try:
        return median_us(calls)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    finally:
        linear_module.w8a8_linear_config = chosen


def rows_in_8_bit(bandwidth: float) -> list[dict[str, object]]:
    print(f"\n{'rows in 8 bit':>16} {'tokens':>7} {'us':>8} {'of limit':>9}")
    found = []
    for tokens in (64, 256, 8192):
        gain = randn(HIDDEN)
        cases: dict[str, tuple[int, Callable[[], Callable[[], object]]]] = {
            "quantize_rows": (HIDDEN * 3, lambda: partial(quantize_rows, randn(tokens, HIDDEN), torch.int8)),
            "rms_norm_rows": (
                HIDDEN * 7,
                lambda: partial(rms_norm_rows, randn(tokens, HIDDEN), gain, 1e-5, randn(tokens, HIDDEN), torch.int8),
            ),
            "silu_and_mul_rows": (INTER * 5, lambda: partial(silu_and_mul_rows, randn(tokens, 2 * INTER), torch.int8)),
        }
        for name, (row_bytes, make) in cases.items():
            us = median_us([make() for _ in range(num_copies(row_bytes * tokens))])
            share = row_bytes * tokens / us / 1e3 / bandwidth
            print(f"{name:>16} {tokens:7} {us:8.2f} {share:9.0%}", flush=True)
            found.append({"op": name, "tokens": tokens, "us": round(us, 2)})
    return found


def pages_of(num_blocks: int, bits: int, num_parts: int) -> QuantizedPages:
    shape = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE)
    data = torch.randint(0, 256, (*shape, HEAD_DIM * bits // 8), dtype=torch.uint8, device="cuda")
    return QuantizedPages(data, (torch.rand(*shape, 2 * num_parts, device="cuda") * 0.02).bfloat16(), bits)


def keys_and_values(num_blocks: int, bits: int) -> tuple[QuantizedPages, QuantizedPages]:
    return pages_of(num_blocks, bits, 2 if bits == 4 else 1), pages_of(num_blocks, bits, 1)


def decode_calls(batch: int, context: int, bits: int) -> tuple[list[Callable[[], object]], int]:
    """(calls, bytes of one); bits 16: the dense kernel."""
    blocks = batch * (context // BLOCK_SIZE)
    a_key = {16: 2 * HEAD_DIM * 2, 8: 2 * HEAD_DIM + 8, 4: HEAD_DIM + 12}[bits]
    num_bytes = batch * (context * NUM_KV_HEADS * a_key + 2 * NUM_HEADS * HEAD_DIM * 2)
    q = randn(batch, NUM_HEADS, HEAD_DIM)
    tables = torch.randperm(blocks, device="cuda").view(batch, -1).int()
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    calls: list[Callable[[], object]] = []
    for _ in range(num_copies(num_bytes)):
        if bits == 16:
            k, v = (randn(blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in "kv")
            calls.append(lambda k=k, v=v: paged_decode_attention(q, k, v, tables, lens, HEAD_DIM**-0.5))
        else:
            pages = keys_and_values(blocks, bits)
            calls.append(lambda pages=pages: quantized_decode_attention(q, *pages, tables, lens, HEAD_DIM**-0.5))
    return calls, num_bytes


def decodes(bandwidth: float) -> list[dict[str, object]]:
    print(f"\n{'decode attention':>18} {'bits':>5} {'us':>8} {'GB/s':>7} {'of limit':>9} {'dense/this':>10}")
    found = []
    for batch, context in DECODES:
        dense = 0.0
        for bits in (16, 8, 4):
            calls, num_bytes = decode_calls(batch, context, bits)
            us = median_us(calls)
            dense = dense or us
            rate = num_bytes / us / 1e3
            print(
                f"{batch:>9} x {context:<6} {bits:5} {us:8.1f} {rate:7.0f} {rate / bandwidth:9.0%} {dense / us:10.2f}", flush=True
            )
            found.append(
                {"op": "decode", "batch": batch, "context": context, "bits": bits, "us": round(us, 2), "gb_s": round(rate)}
            )
            del calls
            torch.cuda.empty_cache()
    return found


#: Keys a tile and most registers a thread (0: no limit), by which 8 to 16 programs fit a multiprocessor.
DECODE_TILES = ((16, 128), (16, 0), (32, 128), (32, 168), (64, 168), (64, 0))


def sweep_decodes() -> None:
    chosen = decode_module.quantized_decode_attention_config
    for (batch, context), bits in itertools.product(DECODES, (8, 4)):
        calls, num_bytes = decode_calls(batch, context, bits)
        found: list[tuple[float, str]] = []
        splits = sorted({max(1, programs * 132 // (batch * NUM_KV_HEADS)) for programs in (8, 16, 24)})
        for (block_n, registers), num_splits in itertools.product(DECODE_TILES, splits):

            def config(**shape: int) -> object:
                tile = {"block_n": block_n, "max_registers": registers, "num_splits": num_splits, "min_split_tokens": 64}
                return dataclasses.replace(chosen(**shape), **tile)

            decode_module.quantized_decode_attention_config = config
            try:
                found.append((median_us(calls), f"keys {block_n}, registers {registers}, splits {num_splits}"))
            except triton.runtime.errors.OutOfResources:
                continue
        decode_module.quantized_decode_attention_config = chosen
        found.sort()
        print(
            f"decode {batch} x {context}, {bits} bit: {num_bytes / found[0][0] / 1e3:.0f} GB/s; now {median_us(calls):.1f} us",
            flush=True,
        )
        for us, tile in found:
            print(f"    {us:7.1f} us ({tile})", flush=True)
        del calls
        torch.cuda.empty_cache()


def prefills() -> list[dict[str, object]]:
    rows, length = 16, 4096
    blocks = rows * length // BLOCK_SIZE
    q = randn(rows * length, NUM_HEADS, HEAD_DIM)
    tables = torch.randperm(blocks, device="cuda").view(rows, -1).int()
    lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    starts = torch.arange(0, rows * length + 1, length, device="cuda").int()
    scale = HEAD_DIM**-0.5
    k, v = (randn(blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in "kv")
    us = {"dense": median_us([lambda: paged_prefill_attention(q, k, v, tables, lens, starts, scale)])}
    for bits in (8, 4):
        pages, prefills = keys_and_values(blocks, bits), [(length, length)] * rows
        us[f"int{bits}"] = median_us([lambda: quantized_prefill_attention(q, *pages, tables, lens, starts, scale, 0, prefills)])
    print(
        f"\nprefill attention {rows} x {length}, us: " + ", ".join(f"{name} {value:.0f}" for name, value in us.items()),
        flush=True,
    )
    return [{"op": "prefill", "rows": rows, "length": length} | {name: round(value, 1) for name, value in us.items()}]


def stores() -> list[dict[str, object]]:
    found = []
    for tokens in (64, 256, 8192):
        blocks = -(-tokens // BLOCK_SIZE)
        angle, slots = torch.rand(tokens, HEAD_DIM // 2, device="cuda"), torch.arange(tokens, device="cuda")
        cos, sin, us = angle.cos(), angle.sin(), {}
        inputs = [randn(tokens, QKV) for _ in range(num_copies(4 * tokens * QKV))]
        for bits in (16, 8, 4):
            if bits == 16:
                pages = [randn(blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in "kv"]
                function: Callable[..., object] = rotary_store_kv
            else:
                pages, function = keys_and_values(blocks, bits), rotary_store_quantized_kv
            us[f"{bits} bit"] = median_us(
                [lambda qkv=qkv: function(qkv, cos, sin, None, *pages, slots, NUM_HEADS, NUM_KV_HEADS) for qkv in inputs]
            )
        print(
            f"rotary and store of {tokens} tokens, us: " + ", ".join(f"{name} {value:.1f}" for name, value in us.items()),
            flush=True,
        )
        found.append({"op": "store", "tokens": tokens} | {name: round(value, 2) for name, value in us.items()})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="linear,rows,decode,prefill,store", help="comma-separated (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="also time tiles of linear and decode against each other; minutes")
    parser.add_argument("--bandwidth", type=float, default=4620.0, help="GB/s that a share of 100%% means (default: %(default)s)")
    args = parser.parse_args()
    compile_ahead.in_processes()
    wanted, rows = set(args.only.split(",")), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    parts = {
        "linear": linears,
        "rows": lambda: rows_in_8_bit(args.bandwidth),
        "decode": lambda: decodes(args.bandwidth),
        "prefill": prefills,
        "store": stores,
    }
    for name, part in parts.items():
        if name in wanted:
            rows += part()
    if args.sweep and "decode" in wanted:
        sweep_decodes()
    if args.sweep and "linear" in wanted:
        sweep_linears(torch.int8, ROWS)
        sweep_linears(torch.float8_e4m3fn, (64,))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    print(json.dumps({"bench": "quantized", "gpu": torch.cuda.get_device_name(), "commit": commit()} | versions | {"rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
