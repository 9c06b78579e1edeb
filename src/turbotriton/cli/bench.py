"""`turbotriton bench URL`: loads a running server and reports throughput, latencies and goodput."""

import argparse
import asyncio
import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbotriton.contract import env
from turbotriton.contract.errors import InvalidInputError

if TYPE_CHECKING:
    from turbotriton.client.bench.load import Record
    from turbotriton.client.bench.targets import Address, Sampling
    from turbotriton.client.bench.workload import Item, LengthRange

__all__ = ["add_parser"]

logger = logging.getLogger(__name__)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "bench",
        help="load a running server and measure it",
        description="Send requests to a running server and report throughput, TTFT, TPOT, ITL and E2E percentiles, and goodput "
        "under limits. Writes requests.csv, summary.json and report.html.",
    )
    parser.add_argument("url", metavar="URL", help="HOST:PORT of tritonserver's gRPC or HTTP port, or an OpenAI server's URL")
    parser.add_argument("--interface", choices=("grpc", "generate_stream", "openai"), default="grpc", help="what to speak")
    parser.add_argument("--model", help="model's name; unset: the only one that the server has")
    parser.add_argument("--api-key", default=None, help="of an OpenAI server; unset: the variable OPENAI_API_KEY")
    _add_workload(parser)
    _add_arrivals(parser)
    out = parser.add_argument_group("what is measured and written")
    out.add_argument(
        "--slo",
        nargs="+",
        type=_slo,
        metavar="NAME=MS",
        default=[],
        help="limits for goodput: ttft=, tpot= and e2e= in milliseconds",
    )
    out.add_argument("--warmup", type=_count, metavar="INT", default=1, help="requests that are sent first and not measured")
    out.add_argument("--output-dir", type=Path, default=Path("bench"), help="folder of the three files")
    out.add_argument("--timeout", type=float, default=600.0, help="seconds after which a request counts as failed")
    parser.set_defaults(run=run)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is sent")
    group.add_argument(
        "--dataset", choices=("random", "sharegpt", "trace"), default="random", help="where prompts and lengths come from"
    )
    group.add_argument(
        "--dataset-path", type=Path, help="sharegpt: the JSON file; trace: a CSV with TIMESTAMP,ContextTokens,GeneratedTokens"
    )
    group.add_argument("--num-prompts", type=_count, metavar="INT", default=None, help="requests (unset: 100; of a trace: all)")
    group.add_argument("--input-len", type=_lengths, default="128", metavar="N|LOW:HIGH", help="random: tokens of a prompt")
    group.add_argument(
        "--output-len", type=_lengths, default="128", metavar="N|LOW:HIGH", help="random, sharegpt: tokens to ask for"
    )
    group.add_argument(
        "--id-range", type=_lengths, default="16:400", metavar="LOW:HIGH", help="random, trace: token ids to draw from"
    )
    group.add_argument(
        "--tokenizer", type=Path, help="sharegpt: folder with tokenizer.json; asks for as many tokens as the recorded reply has"
    )
    group.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    group.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="every answer has exactly the tokens asked for"
    )
    group.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals")


def _add_arrivals(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("when it is sent (a trace brings its own times)")
    group.add_argument(
        "--concurrency",
        type=_count,
        metavar="INT",
        default=None,
        help="most requests at once (unset: 16, or no limit with a rate or a trace)",
    )
    group.add_argument(
        "--request-rate", type=_rate, metavar="FLOAT", default=None, help="requests a second, Poisson arrivals; inf: all at once"
    )
    group.add_argument("--trace-speed", type=_rate, metavar="FLOAT", default=1.0, help="trace: 2 replays it twice as fast")


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError(text)
    return value


def _rate(text: str) -> float:
    if not (value := float(text)) > 0:
        raise ValueError(text)
    return value


def _lengths(text: str) -> "LengthRange":
    from turbotriton.client.bench.workload import LengthRange

    return LengthRange.parse(text)


def _slo(text: str) -> tuple[str, float]:
    from turbotriton.client.bench.summary import parse_slo

    return parse_slo(text)


def run(args: argparse.Namespace) -> int:
    from turbotriton.client.bench.report import format_summary, write_report
    from turbotriton.client.bench.summary import summarise
    from turbotriton.client.bench.targets import Address, Sampling

    items = make_items(args)
    concurrency = args.concurrency or (16 if items[0].arrival_s is None else None)
    address = Address(args.url, args.model, args.api_key or env.openai_api_key())
    records = asyncio.run(_measure(args, address, Sampling(args.temperature, args.ignore_eos, args.timeout), items, concurrency))
    summary = summarise(records, dict(args.slo))
    settings = {name: value for name, value in vars(args).items() if name not in ("api_key", "run", "unknown", "slo")}
    write_report(args.output_dir, records, summary, settings | {"concurrency": concurrency, "num_prompts": len(items)})
    print(format_summary(summary))
    print(f"\nwritten: {args.output_dir / 'report.html'}, summary.json, requests.csv")
    return 1 if summary.num_failed else 0


def make_items(args: argparse.Namespace) -> "list[Item]":
    """The workload that the options ask for. Raises InvalidInputError for options that contradict each other."""
    from turbotriton.client.bench.workload import poisson_arrivals, random_items, sharegpt_items, trace_items

    _refuse(args.dataset != "random" and args.dataset_path is None, f"--dataset {args.dataset} needs --dataset-path FILE")
    _refuse(args.dataset == "random" and args.dataset_path is not None, "--dataset-path needs --dataset sharegpt or trace")
    _refuse(
        args.dataset == "trace" and args.request_rate is not None,
        "--request-rate: a trace brings its own arrival times; use --trace-speed",
    )
    _refuse(args.dataset != "trace" and args.trace_speed != 1.0, "--trace-speed needs --dataset trace")
    _refuse(args.dataset != "sharegpt" and args.tokenizer is not None, "--tokenizer needs --dataset sharegpt")
    _refuse(args.num_prompts == 0 or args.concurrency == 0, "--num-prompts and --concurrency must be 1 or more")
    id_range = (args.id_range.low, args.id_range.high)
    num = args.num_prompts or 100
    if args.dataset == "trace":
        return trace_items(args.dataset_path, args.num_prompts, args.trace_speed, id_range, args.seed)
    if args.dataset == "sharegpt":
        items = sharegpt_items(args.dataset_path, num, args.output_len, _token_counter(args.tokenizer), args.seed)
    else:
        items = random_items(num, args.input_len, args.output_len, id_range, args.seed)
    return items if args.request_rate is None else poisson_arrivals(items, args.request_rate, args.seed)


def _refuse(is_wrong: bool, message: str) -> None:
    if is_wrong:
        raise InvalidInputError(message)


def _token_counter(folder: Path | None) -> Callable[[str], int] | None:
    if folder is None:
        return None
    from turbotriton.text.detokenizer import TextTokenizer

    tokenizer = TextTokenizer.load(folder)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


async def _measure(
    args: argparse.Namespace, address: "Address", sampling: "Sampling", items: "list[Item]", concurrency: int | None
) -> "list[Record]":
    from tqdm import tqdm

    from turbotriton.client.bench.load import run_load
    from turbotriton.client.bench.targets import open_target

    async with open_target(args.interface, address, sampling) as target:
        warmup = [dataclasses.replace(item, arrival_s=None) for item in items[: args.warmup]]
        for record in await run_load(target, warmup, 1):
            if record.error is not None:
                raise InvalidInputError(f"the first request failed, so nothing is measured: {record.error}")
        tokens = 0
        with tqdm(total=len(items), unit="request", file=sys.stderr, disable=None) as bar:

            def note_end(record: Any) -> None:
                nonlocal tokens
                tokens += record.num_output_tokens
                elapsed = bar.format_dict["elapsed"] or 1e-9
                bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
                bar.update()

            return await run_load(target, items, concurrency, note_end)
