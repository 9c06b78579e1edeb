"""How long a decode step takes by batch and context, beside its limit, and what other choices of kernels' tiles make of it.

    PYTHONPATH=src python3 tests/bench/make_checkpoint.py --shape 8b --out /dev/shm/8b
    PYTHONPATH=src python3 tests/bench/sweep_steps.py --model /dev/shm/8b --batch 1,16,64,256 --context 256,1024,4096 --plots docs/images
    PYTHONPATH=src python3 tests/bench/sweep_steps.py --model /dev/shm/8b --batch 64 --context 1024 \\
        --choice MAX_NARROW_ROWS=0 --choice narrow_linear_config.block_k=64,narrow_linear_config.num_stages=6

A step is what the engine's graphs hold: from slots and positions to logits, without the draw. It is captured once for each batch and
choice, and replayed over random keys and values of every context. Choices take turns in each round; what counts is the median of the
rounds. A choice names constants and fields of configurations in tuning.py, attention_tuning.py and hopper_tuning.py of
backend/ops/kernels; all its parts, joined by commas, hold at once. On Hopper, narrow layers of up to MAX_HOPPER_NARROW_ROWS rows are those
of another kernel, with a hopper_narrow_config. Without a GPU the reference ops run, and there is nothing to choose.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import LARGEST
from triton.errors import TritonError

from turbotriton.backend.capacity import GPUS, ModelShape, decode_step_s
from turbotriton.backend.ops.kernels import attention_tuning, hopper_tuning, tuning
from turbotriton.backend.ops.kernels.fast_launch import forget_launches
from turbotriton.backend.ops.operands import KvPages, QuantizedPages
from turbotriton.backend.runner.decode_graphs import decode_forward
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.backend.scheduling.plan import JoinedRequest, StepPlan
from turbotriton.client.bench.plot import Curve, curves_svg
from turbotriton.contract.ini import read_workspace_config
from turbotriton.contract.wire import SamplingParams

PEAK = GPUS["h200"]
WARM_UP, REPLAYS = 3, 10
KERNELS = "turbotriton.backend.ops."
CHOICES = vars(attention_tuning) | vars(hopper_tuning) | vars(tuning)


@contextlib.contextmanager
def chosen(choice: str) -> Iterator[None]:
    """Inside, every kernel uses what `choice` says, such as "MAX_NARROW_ROWS=0,narrow_linear_config.block_k=64".

    Raises ValueError for a name that is neither a constant nor a field of a configuration there.
    """
    fields: dict[str, dict[str, Any]] = {}
    replaced: dict[str, Any] = {}
    for part in filter(None, choice.split(",")):
        name, _, text = part.partition("=")
        function, _, field = name.partition(".")
        if function not in CHOICES or bool(field) != callable(CHOICES[function]):
            raise ValueError(
                f"{name} is no constant and no field of a configuration of tuning, attention_tuning or hopper_tuning"
            )
        value = json.loads(text)
        if field:
            fields.setdefault(function, {})[field] = value
        else:
            replaced[name] = value
    for function, values in fields.items():
        replaced[function] = _with_fields(CHOICES[function], values)
    modules = [module for name, module in sys.modules.items() if name.startswith(KERNELS)]
    before = [(module, name, vars(module)[name]) for module in modules for name in replaced if name in vars(module)]
    for module, name, _ in before:
        setattr(module, name, replaced[name])
    forget_launches()  # a kernel may read one of them
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        forget_launches()


def _with_fields(function: Callable[..., Any], values: dict[str, Any]) -> Callable[..., Any]:
    def config(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        unknown = values.keys() - {field.name for field in dataclasses.fields(found)}
        if unknown:
            raise ValueError(f"{type(found).__name__} has no {', '.join(sorted(unknown))}")
        return dataclasses.replace(found, **values)

    return config


class Steps:
    """A loaded model whose first `batch` slots hold sequences of up to `max_context` tokens in blocks of their own."""

    def __init__(self, folder: Path, options: dict[str, str], batch: int, max_context: int) -> None:
        workspace = read_workspace_config(folder / "config.ini")
        self.model, self.engine = workspace.model_config(), workspace.engine_config(options.get)
        self._runner = ModelRunner(self.model, self.engine, folder, prepare=False)
        self.device = torch.device(self._runner.device)
        per_row = -(-max_context // self.engine.cache_block_seq_len)
        if batch * per_row > self._runner.num_blocks:
            raise SystemExit(f"{batch} x {max_context} tokens need {batch * per_row} KV blocks of {self._runner.num_blocks}")
        order = torch.randperm(batch * per_row, generator=torch.Generator().manual_seed(0)).view(batch, per_row).tolist()
        joined = tuple(
            JoinedRequest(slot, (1,) * max_context, max_context, tuple(blocks), SamplingParams(), 0, 0, self.model.rope.theta)
            for slot, blocks in enumerate(order)
        )
        self._runner.execute(StepPlan(1, joined=joined))
        with torch.inference_mode():
            for pages in (*self._runner._kv.k, *self._runner._kv.v):
                randomise(pages)

    @torch.inference_mode()
    def prepared(self, batch: int) -> Callable[[int], None]:
        """A step of the first `batch` slots, as a graph where there is a GPU; it takes the context and does not wait."""
        runner = self._runner
        inputs = torch.stack((torch.arange(batch), torch.zeros(batch, dtype=torch.int64))).to(self.device)

        def forward() -> torch.Tensor:
            return decode_forward(runner._decoder, runner._slots, runner._kv, inputs)

        replay: Callable[[], object] = forward
        if self.device.type == "cuda":
            forward()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                forward()
            replay = graph.replay

        def step(context: int) -> None:
            with torch.inference_mode():
                inputs[1] = context - 1
                replay()

        return step

    def milliseconds(self, step: Callable[[int], None], context: int) -> float:
        for _ in range(WARM_UP):
            step(context)
        self._synchronize()
        begun = time.perf_counter()
        for _ in range(REPLAYS):
            step(context)
        self._synchronize()
        return 1000 * (time.perf_counter() - begun) / REPLAYS

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def randomise(pages: KvPages) -> None:
    """Zeros would draw less power than keys do, and let the clock rise."""
    if isinstance(pages, torch.Tensor):
        pages.normal_()
    else:
        pages.data.random_(0, 120)  # e4m3 has no NaN below
        if isinstance(pages, QuantizedPages):
            pages.params.fill_(0.02)


def work_of(shape: ModelShape, quant: str, quant_policy: int, batch: int, context: int) -> dict[str, float]:
    """Least milliseconds of a step on an H200, bytes that it must read, and its operations."""
    limit = decode_step_s(shape, PEAK, batch, context, tp=1, quant=quant, quant_policy=quant_policy)
    head = shape.hidden_size * shape.vocab_size
    weights = shape.weight_bytes(quant) - 2 * (shape.table_elements - head)
    return {
        "limit_ms": 1000 * limit,
        "gigabytes": (weights + batch * context * shape.kv_bytes_a_token(quant_policy)) / 1e9,
        "teraflop": batch
        * (2 * (shape.linear_elements + head) + 4 * context * shape.num_layers * shape.num_heads * shape.head_dim)
        / 1e12,
    }


def write_plots(folder: Path, name: str, found: list[dict[str, Any]]) -> None:
    """<name>-batch.svg, <name>-context.svg: milliseconds of a step and their limit; <name>-roofline.svg: TFLOP/s by FLOP a byte."""

    def curves(of: str, by: str) -> list[Curve]:
        """The smallest and the largest `of`, as curves over `by`, each with its limit."""
        values = {one[of] for one in found}
        lines = []
        for value in sorted({min(values), max(values)}):
            rows = sorted((one for one in found if one[of] == value), key=lambda one: one[by])
            lines.append(Curve(f"{of} {value}", [(one[by], one["step_ms"]) for one in rows]))
            lines.append(Curve("its limit", [(one[by], one["limit_ms"]) for one in rows]))
        return lines

    points = sorted((one["teraflop"] / one["gigabytes"] * 1e3, one["teraflop"] / one["step_ms"] * 1e3) for one in found)
    end = points[-1][0]
    corner = min(end, PEAK.rate_16 / PEAK.bandwidth)
    roof = [(0.0, 0.0), (corner, corner * PEAK.bandwidth / 1e12), (end, min(end * PEAK.bandwidth, PEAK.rate_16) / 1e12)]
    drawn = {
        "batch": (curves("context", "batch"), "rows", "ms a step"),
        "context": (curves("batch", "context"), "tokens of context", "ms a step"),
        "roofline": ([Curve("steps", points), Curve("roof", roof)], "operations a byte", "TFLOP/s"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for what, (lines, x_name, y_name) in drawn.items():
        (folder / f"{name}-{what}.svg").write_text(curves_svg(lines, x_name, y_name) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of make_checkpoint.py")
    parser.add_argument("--batch", default="1,4,16,32,64,128,256", help="rows, comma-separated (default: %(default)s)")
    parser.add_argument("--context", default="256,1024", help="tokens of each row, comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--choice", action="append", default=[], metavar="NAME=VALUE[,...]", help="beside the present ones")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="engine option, as in config.ini")
    parser.add_argument("--plots", type=Path, help="folder for three plots of the present choices")
    args = parser.parse_args()
    if args.choice and not torch.cuda.is_available():
        parser.error("--choice needs a GPU: the reference ops have no tiles")
    batches, contexts = ([int(part) for part in text.split(",")] for text in (args.batch, args.context))
    options = {"max_batch_size": str(max(batches)), "session_len": str(max(8192, *contexts))}
    options |= dict(option.split("=", 1) for option in args.option)
    steps = Steps(args.model, options, max(batches), max(contexts))
    model, policy = steps.model, steps.engine.quant_policy
    quant = {"int4": "awq", "int8": "w8a8"}.get(model.weight_type, "fp8" if model.weight_type in LARGEST else "none")
    shape = ModelShape.of(model, steps.engine.session_len)
    choices = ["", *args.choice]
    found: list[dict[str, Any]] = []
    print(f"{'batch':>5} {'context':>7} {'ms':>8} {'min':>8} {'max':>8} {'of limit':>8}  choice")
    for batch in batches:
        prepared = {}
        for choice in choices:
            try:
                with chosen(choice):
                    prepared[choice] = steps.prepared(batch)
            except (RuntimeError, TritonError) as error:  # tiles that the compiler or the chip refuses
                print(f"{batch:5} {'':>7} {choice} cannot run: {str(error).splitlines()[0]}", flush=True)
        for context in contexts:
            times: dict[str, list[float]] = {choice: [] for choice in prepared}
            for _, (choice, step) in itertools.product(range(args.rounds), prepared.items()):
                times[choice].append(steps.milliseconds(step, context))
            work = work_of(shape, quant, policy, batch, context)
            for choice, each in times.items():
                median = statistics.median(each)
                share = work["limit_ms"] / median
                print(f"{batch:5} {context:7} {median:8.3f} {min(each):8.3f} {max(each):8.3f} {share:8.2f}  {choice}", flush=True)
                found.append({"batch": batch, "context": context, "choice": choice, "step_ms": round(median, 4), **work})
        del prepared
    if args.plots is not None:
        name = model.model_name + ("" if quant == "none" else f"-{quant}") + (f"-kv{policy}" if policy else "")
        write_plots(args.plots, name, [one for one in found if not one["choice"]])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"model": model.model_name, "weights": quant, "quant_policy": policy, "device": device, "steps": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
