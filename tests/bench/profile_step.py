"""Where a decode step's time goes: kernels by share, gaps between them, and the host's part.

    PYTHONPATH=src python3 tests/bench/profile_step.py --model /dev/shm/1.8b --batch 1,256 --context 896

`busy` is the device time inside kernels over the time from the first kernel to the last; `gaps` is the rest.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import torch
from bench_engine import make_engine
from torch.profiler import ProfilerActivity, profile

from turbotriton.backend.engine.engine import Engine
from turbotriton.contract.ini import read_workspace_config
from turbotriton.contract.wire import GenerateRequest, SamplingParams

WARM_UP_STEPS = 10


def start(engine: Engine, batch: int, context: int, vocab: int, new: int) -> None:
    """Steps until every request decodes."""
    draw = random.Random(1)
    for index in range(batch):
        sampling = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
        engine.add("profile", GenerateRequest(index, tuple(draw.choices(range(3, vocab), k=context)), sampling))
    waiting = set(range(batch))
    while waiting:
        waiting -= {delta.request_id for delta in engine.step().get("profile", [])}


def profiled(engine: Engine, num_steps: int) -> dict[str, object]:
    for _ in range(WARM_UP_STEPS):
        engine.step()
    host = []
    torch.cuda.synchronize()
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(num_steps):
            before = time.perf_counter()
            engine.step()
            host.append(time.perf_counter() - before)
        torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    kernels = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy = reach = 0.0
    for first, last in spans:  # programmatic launches overlap
        busy += max(0.0, last - max(first, reach))
        reach = max(reach, last)
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event.name].append(event.time_range.end - event.time_range.start)
    return {
        "step_ms": 1000 * wall / num_steps,
        "host_call_ms": 1000 * sum(host) / num_steps,
        "device_ms": (spans[-1][1] - spans[0][0]) / 1000 / num_steps,
        "busy": busy / (spans[-1][1] - spans[0][0]),
        "kernels": sorted(
            ((name, len(times) / num_steps, sum(times) / num_steps) for name, times in by_name.items()),
            key=lambda entry: -entry[2],
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of make_checkpoint.py")
    parser.add_argument("--batch", default="1,64,256", help="comma-separated (default: %(default)s)")
    parser.add_argument("--context", type=int, default=896, help="prompt tokens of each request (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--top", type=int, default=14, help="kernels to show (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="engine option, as in config.ini")
    args = parser.parse_args()
    options = {"max_batch_size": "256", "session_len": "8192", "enable_prefix_caching": "0"}
    options |= dict(option.split("=", 1) for option in args.option)
    engine = make_engine(args.model, options)
    vocab = read_workspace_config(args.model / "config.ini").model_config().vocab_size
    summary = {}
    for batch in map(int, args.batch.split(",")):
        start(engine, batch, args.context, vocab, new=WARM_UP_STEPS + args.steps + 400)
        found = profiled(engine, args.steps)
        engine.cancel_owner("profile")
        while engine.has_work:
            engine.step()
        shown = {name: round(float(found[name]), 3) for name in ("step_ms", "host_call_ms", "device_ms", "busy")}  # type: ignore[arg-type]
        print(f"batch {batch}, context {args.context}: {shown}")
        for name, count, micros in found["kernels"][: args.top]:  # type: ignore[index]
            print(f"  {micros:9.1f} us a step  {count:6.1f} x  {micros / count:8.2f} us  {name[:100]}")
        summary[batch] = shown
    engine.close()
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
