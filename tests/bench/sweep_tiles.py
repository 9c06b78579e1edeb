"""Tile choices of the kernels that a step lives on, compared: sweep_tiles.py [linear|narrow|attention|prefill|gate_up|w4a16|w8a8]

Method as in bench_ops.py: calls over weights or caches that together exceed the L2 cache, captured in one CUDA graph; the median of
its replays. All choices are compiled in several processes first. They stand in backend/ops/kernels/tuning.py; w4a16 (w4a16_choices.py)
compares each result with today's, and `--plan` prints them with their programs and needs no GPU. gate_up compares with cuBLAS and SiLU,
w8a8 Hopper's tiles with what a layer runs today; output and down projections there with the norm that reads their sums.
"""
# ruff: noqa: B023 (every closure is called before the loop goes on)

import argparse
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable

import compile_ahead
import torch
import w4a16_choices
import w8a8_choices
from sweep_steps import chosen
from triton.errors import TritonError

from turbotriton.backend.ops.kernels import attention_tuning, hopper_tuning, hopper_w4a16_linear, hopper_w8a8_linear, tuning
from turbotriton.backend.ops.kernels import hopper_gate_up as gate_up_module
from turbotriton.backend.ops.kernels import narrow_linear as narrow_module
from turbotriton.backend.ops.kernels import paged_decode_attention as attention_module
from turbotriton.backend.ops.kernels import paged_prefill_attention as prefill_module
from turbotriton.backend.ops.kernels import skinny_linear as linear_module
from turbotriton.backend.ops.kernels import w4a16_linear as w4a16_module
from turbotriton.backend.ops.kernels import w8a8_linear as w8a8_module
from turbotriton.backend.ops.kernels.quantize_rows import quantize_rows, rms_norm_rows
from turbotriton.backend.ops.kernels.silu_and_mul import silu_and_mul
from turbotriton.backend.ops.kernels.w4a16_dequantize import dequantize_w4a16
from turbotriton.backend.ops.operands import Unadded, W4A16Tiles, W8A8Weight, whole
from turbotriton.backend.ops.packing import fragment_params

SAMPLES = 11
SHAPES = {
    "1.8b": (2048, 8192, 4096, 16, 92544),
    "8b": (4096, 14336, 6144, 32, 128256),
}  # hidden, inter, qkv columns, heads, vocab


def median_us(calls: list[Callable[[], object]]) -> float:
    """Microseconds of one call."""
    if compile_ahead.compiles(calls):
        return 1.0
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(SAMPLES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / len(calls))
    return statistics.median(times[2:])


def randn(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


def linears(rows: int) -> None:
    for name, (hidden, inter, qkv, _, vocab) in SHAPES.items():
        cases = [("norm_linear", hidden, qkv), ("norm_gate_up", hidden, 2 * inter), ("norm_linear", hidden, vocab)]
        for op, k, n in [*cases, ("linear", hidden, hidden), ("linear", inter, hidden)]:
            copies = max(2, min(24, (400 << 20) // (k * n * 2)))
            weights = [(randn(n, k) * k**-0.5).t() for _ in range(copies)]
            x, residual, gain = randn(rows, k), randn(rows, k), randn(k)
            gigabytes = k * n * 2 / 1e9
            cublas = median_us([lambda w=w: x @ w for w in weights])
            function = getattr(linear_module, op)
            inputs = (x,) if op == "linear" else (x, residual, gain, 1e-5)
            calls = [lambda w=w: function(*inputs, w) for w in weights]
            now = median_us(calls)
            found = []
            base = tuning.skinny_linear_config(rows, k, 2, whole_rows=op != "linear", gated=op == "norm_gate_up")
            choices: list[dict[str, int]] = [
                {"block_n": block_n, "block_k": block_k}
                for block_n, block_k in (((2, 512), (4, 512), (4, 1024), (2, 1024), (2, 2048)) if op == "linear" else ())
            ]
            if op != "linear":
                halves = 2 if op == "norm_gate_up" else 1
                choices = [
                    {"block_n": block_n, "num_warps": warps, "programs_per_sm": programs}
                    for block_n, (warps, programs) in itertools.product(
                        (1, 2, 4), ((4, 2), (4, 4), (4, 8), (4, 10**6), (8, 2), (8, 4))
                    )
                    if base.block_m * block_n * halves * base.block_k <= warps * 32 * 160
                ]
            for choice in choices:
                config = dataclasses.replace(base, **choice)
                linear_module.skinny_linear_config = lambda *args, config=config, **kwargs: config
                found.append((median_us(calls), " ".join(f"{key} {value}" for key, value in choice.items())))
            linear_module.skinny_linear_config = tuning.skinny_linear_config
            found.sort()
            best = ";  ".join(f"{us:.1f} us {text}" for us, text in found[:4])
            print(
                f"{name} {op} {rows}x{k}x{n}: cuBLAS {cublas:.1f}, now {now:.1f} us; {gigabytes / found[0][0] * 1e6:.0f} GB/s: {best}",
                flush=True,
            )


def narrows(rows: int) -> None:
    """A tile of x is read again by every program: the more outputs a program has, the less of that passes through the L2 cache."""
    tiles = [
        # block_n, block_k, warps, stages
        (64, 128, 4, 4), (64, 64, 4, 6), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 4, 6), (128, 64, 8, 4), (128, 64, 8, 6),
        (128, 128, 4, 3), (128, 128, 8, 3), (256, 64, 8, 3), (256, 64, 8, 4), (256, 128, 8, 2),
    ]  # fmt: skip
    for name, (hidden, inter, qkv, _, _) in SHAPES.items():
        for layer, k, n in (("qkv", hidden, qkv), ("o", hidden, hidden), ("gate_up", hidden, inter), ("down", inter, hidden)):
            gated = layer == "gate_up"
            columns = 2 * n if gated else n
            copies = max(2, min(24, (400 << 20) // (k * columns * 2)))
            weights = [(randn(columns, k) * k**-0.5).t() for _ in range(copies)]
            x = randn(rows, k)
            cublas = median_us([lambda w=w: x @ w for w in weights])
            function = narrow_module.gate_up if gated else narrow_module.split_linear
            calls = [lambda w=w: function(x, w) for w in weights]
            base = tuning.narrow_linear_config(rows, n, k, 2, 132, gated=gated)
            found = [(median_us(calls), "now")]
            with chosen("MAX_HOPPER_NARROW_ROWS=0"):  # the plain kernel's choices
                for (block_n, block_k, warps, stages), splits in itertools.product(tiles, (1,) if gated else (1, 2, 3, 4, 6, 8)):
                    programs = tuning.ceil_div(n, block_n) * tuning.ceil_div(rows, base.block_m) * splits
                    if (gated and block_n > 128) or not 90 <= programs <= 400:
                        continue
                    choice = {
                        "block_n": block_n, "block_k": block_k, "num_warps": warps, "num_stages": stages, "num_splits": splits,
                    }  # fmt: skip
                    config = dataclasses.replace(base, **choice)
                    narrow_module.narrow_linear_config = lambda *args, config=config, **kwargs: config
                    try:
                        found.append((median_us(calls), " ".join(f"{key} {value}" for key, value in choice.items())))
                    except TritonError:  # more shared memory or registers than there are
                        continue
            narrow_module.narrow_linear_config = tuning.narrow_linear_config
            found.sort()
            best = ";  ".join(f"{us:.1f} us {text}" for us, text in found[:5])
            gigabytes = k * columns * 2 / 1e9
            print(
                f"narrow {name} {layer} {rows}x{k}x{columns}: cuBLAS {cublas:.1f}; {gigabytes / found[0][0] * 1e6:.0f} GB/s: {best}",
                flush=True,
            )


def attentions() -> None:
    original = attention_tuning.decode_attention_config
    for batch, context, heads in [
        (1, 640, 16),
        (1, 32768, 32),
        (8, 1024, 32),
        (16, 1024, 16),
        (32, 1024, 32),
        (48, 1024, 16),
        (128, 1024, 32),
    ]:
        blocks = batch * (context // 64)
        copies = max(1, min(24, (400 << 20) // (blocks * 8 * 64 * 128 * 4)))
        caches = [(randn(blocks, 8, 64, 128), randn(blocks, 8, 64, 128)) for _ in range(copies)]
        q = randn(batch, heads, 128)
        table = torch.zeros((batch, max(8192, context) // 64), dtype=torch.int32, device="cuda")
        table[:, : context // 64] = torch.randperm(blocks, device="cuda").view(batch, -1).int()
        lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        gigabytes = blocks * 8 * 64 * 128 * 4 / 1e9
        found = []
        splits = [(64, 1), (64, 2), (64, 4), (256, 2), (256, 4)]
        tiles = (
            [(64, 2, 3), (64, 4, 3), (64, 2, 4), (32, 2, 5), (128, 4, 3)] if batch > 1 else [(64, 2, 3), (64, 4, 5), (64, 4, 3)]
        )
        for (block_n, warps, stages), (min_split, programs) in itertools.product(tiles, splits):

            def config(*, num_sms: int, choice=(block_n, warps, stages, min_split, programs), **facts: int) -> object:
                block_n, warps, stages, min_split, programs = choice
                base = original(num_sms=num_sms, **facts)
                wanted = tuning.ceil_div(programs * num_sms, facts["batch"] * facts["num_kv_heads"])
                num_splits = max(1, min(wanted, 256, tuning.ceil_div(facts["max_context"], min_split)))
                return dataclasses.replace(
                    base,
                    block_n=block_n,
                    num_warps=warps,
                    num_stages=stages,
                    min_split_tokens=max(min_split, block_n),
                    num_splits=num_splits,
                )

            attention_module.decode_attention_config = config
            calls = [lambda k=k, v=v: attention_module.paged_decode_attention(q, k, v, table, lens, 0.1) for k, v in caches]
            found.append((median_us(calls), block_n, warps, stages, min_split, programs))
        attention_module.decode_attention_config = original
        found.sort()
        best = "  ".join(f"{us:.1f} us (n {n}, w {w}, s {s}, split {m}, p {p})" for us, n, w, s, m, p in found[:4])
        now = median_us([lambda k=k, v=v: attention_module.paged_decode_attention(q, k, v, table, lens, 0.1) for k, v in caches])
        print(
            f"attention {batch} x {context}, {heads} heads: now {now:.1f} us; {gigabytes / found[0][0] * 1e6:.0f} GB/s  {best}",
            flush=True,
        )


def prefills() -> None:
    choices = [
        (128, 64, 5, 8),
        (128, 64, 7, 8),
        (64, 64, 5, 4),
        (64, 64, 7, 4),
        (128, 128, 3, 8),
        (128, 128, 5, 8),
        (64, 128, 5, 4),
    ]
    configs = {
        f"{m} x {n}, stages {stages}, warps {warps}": attention_tuning.PrefillAttentionConfig(m, n, 128, warps, stages)
        for m, n, stages, warps in choices
    }
    original = attention_tuning.prefill_attention_config, prefill_module.takes_hopper_prefill, hopper_tuning.HOPPER_PREFILL_STAGES
    for heads, lengths in [(16, [4096, 4096]), (32, [4096, 4096]), (32, [64 + 61 * i for i in range(16)])]:
        blocks = [-(-length // 64) for length in lengths]
        k, v = randn(sum(blocks), 8, 64, 128), randn(sum(blocks), 8, 64, 128)
        table = torch.zeros((len(lengths), max(blocks)), dtype=torch.int32, device="cuda")
        for row, count in enumerate(blocks):
            table[row, :count] = torch.arange(count, device="cuda") + sum(blocks[:row])
        lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        q = randn(sum(lengths), heads, 128)
        teraflop = sum(4 * heads * 128 * length * (length + 1) / 2 for length in lengths) / 1e12
        calls = [lambda: prefill_module.paged_prefill_attention(q, k, v, table, lens, bounds, 0.1)] * 4
        found = []
        for stages in (3, 4, 5, 6):
            prefill_module.HOPPER_PREFILL_STAGES = stages
            found.append((median_us(calls), f"for Hopper, stages {stages}"))
        prefill_module.takes_hopper_prefill = lambda *args: False
        for label, config in configs.items():
            prefill_module.prefill_attention_config = lambda *args, config=config: config
            found.append((median_us(calls), label))
        prefill_module.prefill_attention_config, prefill_module.takes_hopper_prefill = original[:2]
        prefill_module.HOPPER_PREFILL_STAGES = original[2]
        found.sort()
        best = "  ".join(f"{teraflop / us * 1e6:.0f} ({label})" for us, label in found)
        print(f"prefill attention {heads} heads, {len(lengths)} rows to {max(lengths)}, TFLOP/s: {best}", flush=True)


def relative_rms(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((y.float() - wanted.float()).square().mean().sqrt() / wanted.float().square().mean().sqrt())


def gate_ups(all_rows: list[int]) -> None:
    choices = [{}, *({"num_stages": stages, "group_m": group} for stages in (4, 3) for group in (4, 8, 16, 32, 64))]
    for name, (hidden, inter, _, _, _) in SHAPES.items():
        copies = max(2, min(24, (400 << 20) // (hidden * 2 * inter * 2)))
        weights = [(randn(2 * inter, hidden) * hidden**-0.5).t() for _ in range(copies)]
        for rows in all_rows:
            x = randn(rows, hidden)
            teraflop = 2 * rows * hidden * 2 * inter / 1e12
            product = median_us([lambda w=w: x @ w for w in weights])
            both = median_us([lambda w=w: silu_and_mul(x @ w) for w in weights])
            found = []
            for choice in choices:
                config = dataclasses.replace(hopper_tuning.hopper_gate_up_config(rows, hidden), **choice)
                gate_up_module.hopper_gate_up_config = lambda *shape, config=config: config
                calls = [lambda w=w: gate_up_module.gate_up(x, w) for w in weights]
                if compile_ahead.compiles(calls):
                    continue
                text = " ".join(f"{key} {value}" for key, value in choice.items()) or "now"
                if not (rms := relative_rms(calls[0](), silu_and_mul(x @ weights[0]))) < 0.01:
                    print(f"gate_up {name} x {rows}, {text}: WRONG, {rms:.3f} away", flush=True)
                found.append((median_us(calls), text))
            gate_up_module.hopper_gate_up_config = hopper_tuning.hopper_gate_up_config
            if not found:  # in a process that only compiles
                continue
            found.sort()
            best = ";  ".join(f"{us:.1f} us {text}" for us, text in found)
            print(
                f"gate_up {name} {rows}x{hidden}x{2 * inter}: cuBLAS {product:.1f} us ({teraflop / product * 1e6:.0f} TFLOP/s), with SiLU "
                f"{both:.1f} us; {teraflop / found[0][0] * 1e6:.0f} TFLOP/s: {best}",
                flush=True,
            )


def w4a16_weight(k: int, n: int, gated: bool) -> W4A16Tiles:
    words = torch.randint(-(2**31), 2**31 - 1, (n // 16, k // 64, 32, 4), dtype=torch.int32, device="cuda")
    scales = torch.rand((k // w4a16_choices.GROUP_SIZE, n), device="cuda") * 0.01 + 0.001
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, device="cuda")
    return W4A16Tiles(words, fragment_params(scales, zeros, torch.bfloat16), None, torch.bfloat16, gated)


def w4a16_call(choice: w4a16_choices.Choice, x: torch.Tensor, weight: W4A16Tiles) -> Unadded | None:
    """None where the choice does not fit the layer."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    config = choice.config(x.shape[0], weight.in_features, weight.out_features, num_sms)
    if config is None:
        return None
    if isinstance(config, w4a16_choices.Dequantised):
        y = x @ dequantize_w4a16(weight)
        return silu_and_mul(y) if weight.gated else y
    if isinstance(config, hopper_tuning.HopperTiles):
        if isinstance(choice, w4a16_choices.Hopper) and choice.form == "parts" and not config.whole:
            num_parts = config.num_programs // (weight.out_features // config.block_n)
            return hopper_w4a16_linear.split_linear(x, weight, config, num_parts)
        return hopper_w4a16_linear.linear(x, weight, config)
    w4a16_module.takes_hopper_w4a16 = lambda *args, **facts: False
    w4a16_module.w4a16_linear_config = lambda *args, **facts: config
    return (w4a16_module.w4a16_gate_up if weight.gated else w4a16_module.w4a16_linear)(x, weight)


def w4a16(all_rows: list[int]) -> None:
    for rows in all_rows:
        found = w4a16_choices.choices(rows)
        sums = [0.0] * len(found)
        for layer, (k, n, gated) in w4a16_choices.LAYERS.items():
            copies = max(2, min(24, (400 << 20) // (k * n // 2)))
            weights = [w4a16_weight(k, n, gated) for _ in range(copies)]
            x = randn(rows, k)
            wanted = w4a16_call(found[0], x, weights[0])
            assert isinstance(wanted, torch.Tensor)
            times: list[tuple[float, str]] = []
            for index, choice in enumerate(found):
                calls = [lambda w=w: w4a16_call(choice, x, w) for w in weights]
                if compile_ahead.compiles(calls):
                    continue
                try:
                    y, problem = calls[0](), "does not fit"
                except (RuntimeError, AssertionError, TritonError) as error:  # shared memory or registers that are not there
                    y, problem = None, f"{type(error).__name__}: {error}".splitlines()[0]
                if y is None:
                    print(f"{layer} x {rows}: {choice}: left out, {problem}", flush=True)
                    sums[index] = float("inf")
                    continue
                if not (rms := relative_rms(whole(y), wanted)) < 0.01:
                    print(f"{layer} x {rows}: {choice}: WRONG, {rms:.3f} away from today's", flush=True)
                times.append((median_us(calls), str(choice)))
                sums[index] += times[-1][0]
            gigabytes = (k * n // 2 + k * n // w4a16_choices.GROUP_SIZE * 4) / 1e9
            if not times:  # in a process that only compiles
                continue
            today = times[0][0]
            times.sort()
            best = ";  ".join(f"{us:.1f} us {text}" for us, text in times[:5])
            print(f"{layer} x {rows}: today {today:.1f} us; {gigabytes / times[0][0] * 1e6:.0f} GB/s: {best}", flush=True)
        best = ";  ".join(
            f"{us:.1f} us {text}" for us, text in sorted((us, str(c)) for us, c in zip(sums, found, strict=True))[:5]
        )
        print(f"a layer's four x {rows}: today {sums[0]:.1f} us: {best}", flush=True)


def w8a8(all_rows: list[int]) -> None:
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    for rows in all_rows:
        for layer, (k, n, gated) in w4a16_choices.LAYERS.items():
            copies = max(2, min(24, (400 << 20) // (k * n)))
            weights = [w8a8_weight(k, n) for _ in range(copies)]
            x = quantize_rows(randn(rows, k), torch.int8)
            residual, gain = randn(rows, n), randn(n)

            def read(y: Unadded, layer: str = layer) -> Unadded:
                return rms_norm_rows(y, gain, 1e-5, residual, torch.int8)[1] if layer in ("o", "down") else y

            def today(w: W8A8Weight) -> object:
                return w8a8_module.w8a8_gate_up(x, w) if gated else read(w8a8_module.w8a8_split_linear(x, w))

            def of(w: W8A8Weight, tiles: hopper_tuning.HopperTiles, num_parts: int) -> Unadded:
                if num_parts > 1:
                    return read(hopper_w8a8_linear.split_linear(x, w, tiles, num_parts))
                return read((hopper_w8a8_linear.gate_up if gated else hopper_w8a8_linear.linear)(x, w, tiles))

            product = x.values[:rows].float() * x.scale[:rows, None] @ (weights[0].weight.float() * weights[0].scale)
            wanted = whole(read(silu_and_mul(product) if gated else product.bfloat16()))
            times = [(median_us([lambda w=w: today(w) for w in weights]), "today, with 8 bit rows" if gated else "today")]
            for name, tiles, num_parts in w8a8_choices.choices(rows, n, k, num_sms):
                if gated and not tiles.whole:
                    continue
                calls = [lambda w=w: of(w, tiles, num_parts) for w in weights]
                if compile_ahead.compiles(calls):
                    continue
                if not (rms := relative_rms(whole(calls[0]()), wanted)) < 0.01:
                    print(f"{layer} x {rows}: {name}: WRONG, {rms:.3f} away", flush=True)
                times.append((median_us(calls), name))
            times.sort()
            best = ";  ".join(f"{us:.1f} us {text}" for us, text in times)
            print(f"w8a8 {layer} x {rows}: {best}", flush=True)


def w8a8_weight(k: int, n: int) -> W8A8Weight:
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    return W8A8Weight(values.t(), torch.rand(n, device="cuda") * 1e-3 + 1e-4, None)


def w4a16_plan(all_rows: list[int], num_sms: int) -> None:
    for rows in all_rows:
        for choice in w4a16_choices.choices(rows):
            parts = []
            for layer, (k, n, _) in w4a16_choices.LAYERS.items():
                fits = choice.config(rows, k, n, num_sms) is not None
                parts.append(f"{layer} {choice.num_programs(rows, k, n, num_sms) if fits else 'does not fit'}")
            print(f"x {rows}: {choice}: programs {', '.join(parts)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="*", default=["attention", "linear", "narrow", "prefill"], help="(default: all but the last three)"
    )
    parser.add_argument("--narrow-rows", default="16,64", help="the same of narrow layers (default: %(default)s)")
    parser.add_argument("--gate-up-rows", default="256,512,2048,8192", help="the same of gate_up (default: %(default)s)")
    parser.add_argument("--rows", default="1", help="rows of x, comma-separated (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="print the choices of w4a16 for 132 multiprocessors")
    args = parser.parse_args()
    all_rows = list(map(int, args.rows.split(",")))
    if not args.plan:
        compile_ahead.in_processes()
    if "w4a16" in args.what:
        (functools.partial(w4a16_plan, num_sms=132) if args.plan else w4a16)(all_rows)
    if "w8a8" in args.what:
        w8a8(all_rows)
    if "attention" in args.what:
        attentions()
    if "prefill" in args.what:
        prefills()
    if "gate_up" in args.what:
        gate_ups(list(map(int, args.gate_up_rows.split(","))))
    if "narrow" in args.what:
        for rows in map(int, args.narrow_rows.split(",")):
            narrows(rows)
    if "linear" in args.what:
        for rows in all_rows:
            linears(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
