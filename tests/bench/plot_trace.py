"""What a trace of the work thr says of decode steps: their time by rows beside the limit, as a table, and drawn.

    PYTHONPATH=src python3 tests/bench/bench_engine.py --model /dev/shm/8b --work thr --trace traces
    PYTHONPATH=src python3 tests/bench/plot_trace.py traces/thr.csv --shape 8b --plots docs/images

A trace has the milliseconds and the tokens that came back of each step. Every request's length is known, so that tells who was there: while
prompts come in, as many tokens come back as requests have begun. Steps with prompts are left out; so are those whose tokens do not
agree with that.
"""

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench_engine import lengths_of
from make_checkpoint import SHAPES, workspace_config
from sweep_steps import PEAK, work_of

from turbotriton.backend.capacity import ModelShape
from turbotriton.client.bench.plot import Curve, curves_svg

ROWS_TOGETHER = 16


class Step(NamedTuple):
    ms: float
    rows: int
    num_keys: int  # of all rows


def decode_steps(trace: Sequence[tuple[float, int]], lengths: Sequence[tuple[int, int]]) -> list[Step]:
    """trace: (milliseconds, tokens that came back) of each step; lengths: (prompt tokens, new tokens) in the order of service.

    Raises ValueError for the trace of another work.
    """
    trace = [(ms, tokens) for ms, tokens in trace if tokens]
    begins: list[int] = []  # of each request: the step that brought its first token
    for number, (_, tokens) in enumerate(trace):
        begins += [number] * (tokens - len(begins))
        if len(begins) == len(lengths):
            break
    if len(begins) != len(lengths) or sum(tokens for _, tokens in trace) != sum(new for _, new in lengths):
        raise ValueError(f"{len(lengths)} requests with {sum(new for _, new in lengths)} tokens do not make this trace")
    found = []
    for number, (ms, tokens) in enumerate(trace):
        rows = [
            prompt + number - begin for (prompt, new), begin in zip(lengths, begins, strict=True) if begin <= number < begin + new
        ]
        if number > begins[-1] and len(rows) == tokens:
            found.append(Step(ms, len(rows), sum(rows)))
    return found


def limits_of(steps: Sequence[Step], shape: ModelShape) -> list[dict[str, float]]:
    return [work_of(shape, "none", 0, step.rows, round(step.num_keys / step.rows)) for step in steps]


def write_plots(folder: Path, name: str, steps: Sequence[Step], works: Sequence[dict[str, float]]) -> None:
    """<name>-thr-rows.svg: medians of milliseconds and limit by rows;  <name>-thr-roofline.svg: TFLOP/s by operations a byte."""
    pairs = list(zip(steps, works, strict=True))
    measured, limit = [], []
    for rows in sorted({step.rows for step in steps}):
        measured.append((rows, statistics.median(step.ms for step in steps if step.rows == rows)))
        limit.append((rows, statistics.median(work["limit_ms"] for step, work in pairs if step.rows == rows)))
    points = sorted((work["teraflop"] / work["gigabytes"] * 1e3, work["teraflop"] / step.ms * 1e3) for step, work in pairs)
    end = points[-1][0]
    corner = min(end, PEAK.rate_16 / PEAK.bandwidth)
    roof = [(0.0, 0.0), (corner, corner * PEAK.bandwidth / 1e12), (end, min(end * PEAK.bandwidth, PEAK.rate_16) / 1e12)]
    folder.mkdir(parents=True, exist_ok=True)
    by_rows = curves_svg([Curve("steps", measured), Curve("limit", limit)], "rows of a decode step", "ms")
    roofline = curves_svg([Curve("steps", points), Curve("roof", roof)], "operations a byte", "TFLOP/s")
    (folder / f"{name}-thr-rows.svg").write_text(by_rows + "\n")
    (folder / f"{name}-thr-roofline.svg").write_text(roofline + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="thr.csv of bench_engine.py --trace")
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True, help="of the model")
    parser.add_argument("--plots", type=Path, help="folder for two plots")
    args = parser.parse_args()
    with args.trace.open() as file:
        trace = [(float(row["ms"]), int(row["tokens"])) for row in csv.DictReader(file)]
    try:
        steps = decode_steps(trace, lengths_of("thr"))
    except ValueError as error:
        parser.error(str(error))
    works = limits_of(steps, ModelShape.of(workspace_config(args.shape, "bf16", 8192).model_config(), 8192))
    print(f"{len(steps)} of {len(trace)} steps; {sum(step.ms for step in steps):.0f} of {sum(ms for ms, _ in trace):.0f} ms")
    print(f"{'rows':>9} {'steps':>6} {'keys':>6} {'ms':>8} {'limit':>8} {'share':>6}")
    for first in range((max(step.rows for step in steps) - 1) // ROWS_TOGETHER * ROWS_TOGETHER + 1, 0, -ROWS_TOGETHER):
        some = [both for both in zip(steps, works, strict=True) if first <= both[0].rows < first + ROWS_TOGETHER]
        if some:
            ms = statistics.mean(step.ms for step, _ in some)
            limit = statistics.mean(work["limit_ms"] for _, work in some)
            keys = sum(step.num_keys for step, _ in some) / sum(step.rows for step, _ in some)
            print(f"{first:4}-{first + ROWS_TOGETHER - 1:4} {len(some):6} {keys:6.0f} {ms:8.2f} {limit:8.2f} {limit / ms:6.2f}")
    if args.plots is not None:
        write_plots(args.plots, args.shape, steps, works)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
