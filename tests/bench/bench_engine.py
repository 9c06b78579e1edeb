"""The engine's speed, in process: the works that docs/performance.md compares engines by.

    PYTHONPATH=src python3 tests/bench/make_checkpoint.py --shape 1.8b --out /dev/shm/1.8b
    PYTHONPATH=src python3 tests/bench/bench_engine.py --model /dev/shm/1.8b --work b1,d64,d256,thr,prefill

    b1        one request, 128 tokens in, 512 out: tokens a second after the first
    d64       64 x (896 in, 256 out): tokens a second from the moment every request has its first until the first request ends
    d16, d256 16 and 256 of the same; void when that window has fewer than 150 steps
    d8k       7,168 in, 1,024 out, as many requests as fit in 40 GiB of keys and values, at most max_batch_size: the same window
    thr       256 prompts of 64 to 1024 tokens, 64 to 512 out, all at once: output tokens a second
    prefill   16 x 4096 in, 1 out: prompt tokens a second
    itl       64 x (256 in, 512 out), and a prompt of 4096 that comes when all of them decode, eight times: p50 of a decode's wait for its
              next token, p99 and longest while a prompt is under way, and the prompt's first token (not run unless named)

Greedy unless --sampling says otherwise, ignore_eos, prompts as random token ids, prefix cache off. A request that gets fewer tokens
than it asked for makes a number void. Before anything is timed, greedy tokens of a small model are compared with those of the reference
ops (--no-check leaves it out).
"""

import argparse
import dataclasses
import gc
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from make_checkpoint import make_checkpoint

from turbotriton.backend.engine.engine import Engine
from turbotriton.backend.runner.kv_cache import FP8_POLICY, kv_block_bytes
from turbotriton.backend.runner.model_runner import ModelRunner, resolve_compute_dtype, resolve_device
from turbotriton.backend.runner.weights import DTYPES
from turbotriton.contract.ini import read_workspace_config
from turbotriton.contract.wire import GenerateRequest, SamplingParams

#: By shape: (limit, goal) of each work; see docs/performance.md.
MARKS = {
    "1.8b": {
        "b1": (1360, 900),
        "d64": (30000, 21000),
        "d256": (36400, 31500),
        "thr": (31600, 25500),
        "prefill": (196000, 172000),
    },
    "8b": {"b1": (308, 250), "d64": (12500, 10000), "d256": (18400, 17000), "thr": (10800, 9500), "prefill": (44600, 41500)},
}
WORKS = ("b1", "d64", "d256", "thr", "prefill")
LONG, LONG_KV_BYTES = (7168, 1024), 40 << 30  # of d8k
MIN_WINDOW_STEPS = 150
NUM_ARRIVALS = 8
STEPS_BETWEEN_ARRIVALS = 24


@dataclass
class Run:
    """What came back. times: when each engine.step() returned; tokens: how many it brought; per request: first and last time."""

    begun: float
    times: list[float]
    tokens: list[int]
    first: dict[int, float]
    last: dict[int, float]
    num_steps: int


def make_engine(folder: Path, options: dict[str, str], *, reference_ops: bool = False) -> Engine:
    workspace = read_workspace_config(folder / "config.ini")
    model, config = workspace.model_config(), workspace.engine_config(options.get)
    return Engine(model, config, ModelRunner(model, config, folder, reference_ops=reference_ops))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def run(engine: Engine, lengths: Sequence[tuple[int, int]], vocab: int, seed: int, sampling: SamplingParams = GREEDY) -> Run:
    """lengths: (prompt tokens, new tokens) of each request, all submitted at once. Raises RuntimeError when one gets too few."""
    draw = random.Random(seed)
    requests = [
        GenerateRequest(
            index,
            tuple(draw.choices(range(3, vocab), k=prompt)),
            dataclasses.replace(sampling, max_new_tokens=new),
        )
        for index, (prompt, new) in enumerate(lengths)
    ]
    synchronize()
    found = Run(time.perf_counter(), [], [], {}, {}, 0)
    got = [0] * len(lengths)
    for request in requests:
        engine.add("bench", request)
    while engine.has_work:
        by_owner = engine.step()
        now = time.perf_counter()
        found.num_steps += 1
        deltas = by_owner.get("bench", [])
        for delta in deltas:
            got[delta.request_id] += len(delta.token_ids)
            if delta.token_ids:
                found.first.setdefault(delta.request_id, now)
            if delta.finish_reason is not None:
                found.last[delta.request_id] = now
        found.times.append(now)
        found.tokens.append(sum(len(delta.token_ids) for delta in deltas))
    short = [index for index, (_, new) in enumerate(lengths) if got[index] != new]
    if short:
        raise RuntimeError(f"void: requests {short[:5]} of {len(lengths)} got {[got[i] for i in short[:5]]} tokens")
    return found


def decode_window(found: Run) -> tuple[float, list[float]]:
    """(tokens a second, milliseconds of each step) from the moment every request has its first token until the first request ends."""
    begin, end = max(found.first.values()), min(found.last.values())
    inside = [(at, count) for at, count in zip(found.times, found.tokens, strict=True) if begin < at <= end and count]
    if not inside:
        raise RuntimeError("void: the first request ended before every request had its first token")
    times = [begin, *(at for at, _ in inside)]
    return sum(count for _, count in inside) / (end - begin), [1000 * (b - a) for a, b in itertools.pairwise(times)]


def scaled(lengths: list[tuple[int, int]], scale: float) -> list[tuple[int, int]]:
    return [(max(2, int(prompt * scale)), new if new == 1 else max(2, int(new * scale))) for prompt, new in lengths]


def lengths_of(work: str, num_long: int = 0) -> list[tuple[int, int]]:
    if work == "thr":
        draw = random.Random(1)
        prompts = [draw.randint(64, 1024) for _ in range(256)]
        lengths = list(zip(prompts, [draw.randint(64, 512) for _ in range(256)], strict=True))
        assert (sum(prompts), sum(new for _, new in lengths)) == (144_753, 71_160)
        return lengths
    if work == "d8k":
        return [LONG] * num_long
    return {
        "b1": [(128, 512)],
        "d16": [(896, 256)] * 16,
        "itl": [(4096, 1)],
        "d64": [(896, 256)] * 64,
        "d256": [(896, 256)] * 256,
        "prefill": [(4096, 1)] * 16,
    }[work]


def num_long_requests(engine: Engine, folder: Path, options: dict[str, str]) -> int:
    """How many of d8k fit in LONG_KV_BYTES, in the engine's own blocks, and at once. Raises RuntimeError where not one does."""
    workspace = read_workspace_config(folder / "config.ini")
    model, config = workspace.model_config(), workspace.engine_config(options.get)
    dtype = DTYPES[resolve_compute_dtype(config.compute_dtype, model.float_type, resolve_device(config.device))]
    block_bytes = kv_block_bytes(model, config, dtype, 8 if config.quant_policy == FP8_POLICY else config.quant_policy)
    blocks = -(-sum(LONG) // config.cache_block_seq_len)
    count = min(LONG_KV_BYTES // block_bytes // blocks, engine.info(0).num_blocks // blocks, config.max_batch_size)
    if count < 1:
        raise RuntimeError(f"void: no request of {sum(LONG)} tokens fits; raise session_len and cache_max_entry_count")
    return count


def measure(
    engine: Engine,
    work: str,
    lengths: list[tuple[int, int]],
    vocab: int,
    scale: float,
    seed: int,
    sampling: SamplingParams,
    trace: Path | None = None,
) -> dict[str, float]:
    if work == "itl":
        return measure_itl(engine, vocab, scale, seed)
    if scale != 1.0:
        lengths = scaled(lengths[: max(1, int(len(lengths) * scale * 4))], scale)
    found = run(engine, lengths, vocab, seed, sampling)
    if trace is not None:
        rows = zip([found.begun, *found.times], found.times, found.tokens, strict=False)
        trace.write_text("ms,tokens\n" + "".join(f"{1000 * (end - begin):.3f},{count}\n" for begin, end, count in rows))
    whole = found.times[-1] - found.begun
    if work == "prefill":
        return {"tok_s": sum(prompt for prompt, _ in lengths) / whole}
    if work == "thr":
        return {"tok_s": sum(new for _, new in lengths) / whole, "seconds": whole}
    rate, steps = decode_window(found)
    if scale == 1.0 and work != "b1" and len(steps) < MIN_WINDOW_STEPS:
        raise RuntimeError(f"void: the window of {work} has {len(steps)} steps, fewer than {MIN_WINDOW_STEPS}")
    first_token_ms = 1000 * (min(found.first.values()) - found.begun)
    p50, p99 = statistics.median(steps), sorted(steps)[int(0.99 * (len(steps) - 1))]
    return {
        "tok_s": rate,
        "requests": len(lengths),
        "window_steps": len(steps),
        "step_p50_ms": p50,
        "step_p99_ms": p99,
        "first_token_ms": first_token_ms,
    }


def measure_itl(engine: Engine, vocab: int, scale: float, seed: int) -> dict[str, float]:
    """Waits in milliseconds; the rate is that of all tokens while prompts come in."""
    draw = random.Random(seed)
    num_decodes, (prompt, new), late_prompt = max(2, int(64 * scale)), scaled([(256, 512)], scale)[0], max(8, int(4096 * scale))
    num_arrivals, pause = (NUM_ARRIVALS, STEPS_BETWEEN_ARRIVALS) if scale == 1.0 else (2, 2)

    def add(request_id: int, prompt_len: int, num_new: int) -> None:
        sampling = SamplingParams(max_new_tokens=num_new, temperature=0.0, ignore_eos=True)
        engine.add("bench", GenerateRequest(request_id, tuple(draw.choices(range(3, vocab), k=prompt_len)), sampling))

    for index in range(num_decodes):
        add(index, prompt, new)
    last: dict[int, float] = {}
    calm, beside, firsts = [], [], []
    arrived: tuple[int, float] | None = None  # the late prompt under way and when it came
    steps_until_next, num_tokens, begun = pause, 0, time.perf_counter()
    while engine.has_work:
        deltas = engine.step().get("bench", [])
        now = time.perf_counter()
        for delta in deltas:
            num_tokens += len(delta.token_ids)
            if delta.request_id in last and delta.request_id < num_decodes:
                (calm if arrived is None else beside).append(1000 * (now - last[delta.request_id]))
            last[delta.request_id] = now
        if arrived is not None and arrived[0] in last:
            firsts.append(1000 * (now - arrived[1]))
            arrived, steps_until_next = None, pause
        elif arrived is None and len(last) >= num_decodes and len(firsts) < num_arrivals:
            steps_until_next -= 1
            if steps_until_next == 0:
                arrived = num_decodes + len(firsts), now
                add(arrived[0], late_prompt, 1)
    if len(firsts) < num_arrivals:
        raise RuntimeError(f"void: the decodes ended after {len(firsts)} of {num_arrivals} prompts")
    p50, p99 = statistics.median(calm), sorted(beside)[int(0.99 * (len(beside) - 1))]
    first_ms = statistics.median(firsts)
    rate = num_tokens / (time.perf_counter() - begun)
    return {"tok_s": rate, "itl_p50_ms": p50, "itl_beside_p99_ms": p99, "itl_max_ms": max(beside), "first_token_ms": first_ms}


def check_against_reference() -> None:
    """Greedy tokens of a small fp32 model: this device's ops against the reference ops."""
    options = {
        "compute_dtype": "fp32",
        "cache_max_entry_count": "64",
        "max_batch_size": "8",
        "num_tokens_per_iter": "64",
        "session_len": "256",
    }
    lengths = [(5, 40), (33, 40), (70, 40), (2, 40), (64, 40), (17, 40)]
    outputs = []
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint("tiny", Path(folder), "fp32", 256, seed=1)
        for reference_ops in (True, False):
            engine = make_engine(Path(folder), options, reference_ops=reference_ops)
            draw = random.Random(5)
            tokens: dict[int, list[int]] = {}
            for index, (prompt, new) in enumerate(lengths):
                sampling = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
                engine.add("check", GenerateRequest(index, tuple(draw.choices(range(3, 320), k=prompt)), sampling))
            while engine.has_work:
                for delta in engine.step().get("check", []):
                    tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            outputs.append(tokens)
            engine.close()
    if outputs[0] != outputs[1]:
        raise SystemExit("greedy tokens differ from the reference ops: no number of this run would count")
    num_distinct = len({token for ids in outputs[0].values() for token in ids})
    if num_distinct < 20 or any(len(outputs[0][index]) != new for index, (_, new) in enumerate(lengths)):
        raise SystemExit(f"the comparison with the reference ops saw {num_distinct} distinct tokens: it would show nothing")
    print(f"greedy tokens equal the reference ops' ({len(lengths)} requests, {num_distinct} distinct tokens)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of make_checkpoint.py")
    parser.add_argument("--work", default=",".join(WORKS), help="comma-separated, also itl (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=2, help="of each work after a warm-up; the median counts (default: %(default)s)"
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="engine option, as in config.ini")
    parser.add_argument("--sampling", default="{}", help='JSON of sampling parameters, such as {"temperature": 1, "top_p": 0.9}')
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the works, to try this program (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the prompts (default: %(default)s)")
    parser.add_argument("--trace", type=Path, help="folder for a CSV of each work's steps: milliseconds, tokens that came back")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison with the reference ops")
    args = parser.parse_args()
    sampling = dataclasses.replace(GREEDY, **json.loads(args.sampling))
    if not args.no_check:
        check_against_reference()
    options = {"max_batch_size": "256", "session_len": "8192", "enable_prefix_caching": "0"}
    options |= dict(option.split("=", 1) for option in args.option)
    begun = time.perf_counter()
    engine = make_engine(args.model, options)
    load_s = time.perf_counter() - begun
    gc.collect()
    gc.freeze()  # as the engine's process does
    model = read_workspace_config(args.model / "config.ini").model_config()
    marks = MARKS.get(model.model_name, {})
    run(engine, scaled([(300, 8), (9, 8), (64, 4)] * 8, min(args.scale * 4, 1.0)), model.vocab_size, 0)
    results: dict[str, object] = {"model": model.model_name, "options": options, "load_s": round(load_s, 2), "scale": args.scale}
    results["sampling"] = json.loads(args.sampling)
    print(f"{model.model_name}: loaded in {load_s:.1f} s; {engine.info(0).num_blocks} KV blocks", flush=True)
    print(f"{'work':8s} {'tok/s':>9s} {'min':>9s} {'max':>9s} {'of goal':>8s} {'of limit':>9s}")
    for work in args.work.split(","):
        try:
            lengths = lengths_of(work, num_long_requests(engine, args.model, options) if work == "d8k" else 0)
            run(engine, scaled(lengths, min(args.scale, 0.25)), model.vocab_size, args.seed, sampling)  # warm-up
            trace = None if args.trace is None else args.trace / f"{work}.csv"
            found = [
                measure(engine, work, lengths, model.vocab_size, args.scale, args.seed + repeat, sampling, trace)
                for repeat in range(args.repeats)
            ]
        except RuntimeError as error:
            print(f"{work:8s} {error}", flush=True)
            results[work] = str(error)
            continue
        rates = [entry["tok_s"] for entry in found]
        median = statistics.median(rates)
        shares = [round(median / mark, 3) for mark in reversed(marks[work])] if work in marks and args.scale == 1.0 else []
        others = {name: round(statistics.median(entry[name] for entry in found), 2) for name in found[0] if name != "tok_s"}
        print(
            f"{work:8s} {median:9.0f} {min(rates):9.0f} {max(rates):9.0f} {' '.join(f'{share:8.2f}' for share in shares)} {others}",
            flush=True,
        )
        results[work] = {"tok_s": round(median, 1), "all": [round(rate, 1) for rate in rates], **others}
        results[work] |= dict(zip(("of_goal", "of_limit"), shares, strict=False))
    if torch.cuda.is_available():
        results["device"] = torch.cuda.get_device_name()
        results["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    engine.close()
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
