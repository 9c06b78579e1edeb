"""`turbotriton lite ...`: calibration and quantisation. Option names are LMDeploy's."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from turbotriton.contract.errors import ConfigError

from .hub import add_hub_options, resolve_model_path

if TYPE_CHECKING:
    from turbotriton.quant.commands import CalibrationOptions

__all__ = ["add_parser"]

Subparsers = argparse._SubParsersAction  # the type that add_subparsers returns has no public name


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("lite", help="make smaller weights: calibrate, auto_awq, smooth_quant, kv_qparams, report")
    children = parser.add_subparsers(title="lite commands", metavar="COMMAND", required=True)
    _add_calibrate(children)
    _add_auto_awq(children)
    _add_smooth_quant(children)
    _add_kv_qparams(children)
    _add_report(children)


def _new(children: "Subparsers[argparse.ArgumentParser]", name: str, text: str) -> argparse.ArgumentParser:
    return children.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of the unquantised Hugging Face checkpoint, or its hub id")
    add(
        "--calib-dataset",
        default="default",
        help="what to calibrate on: default (a text that comes with turbotriton; LMDeploy's default is ptb), a .txt or .jsonl file or "
        "a folder of them, or ptb, c4, wikitext2, pileval through the datasets library (default: %(default)s)",
    )
    add("--calib-samples", type=int, default=128, help="windows of the text (default: %(default)s)")
    add("--calib-seqlen", type=int, default=0, help="tokens a window (default: 2048, or what the model can take if less)")
    add("--work-dir", type=Path, default=Path("work_dir"), help="folder to write, new or empty (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where the model runs (default: %(default)s)")
    add_hub_options(parser)


def _calibration_options(args: argparse.Namespace) -> "CalibrationOptions":
    from turbotriton.quant.commands import CalibrationOptions

    return CalibrationOptions(
        model=resolve_model_path(args.model, args),
        work_dir=args.work_dir,
        dataset=args.calib_dataset,
        num_samples=args.calib_samples,
        seqlen=args.calib_seqlen,
        device=args.device,
    )


def _add_calibrate(children: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = _new(children, "calibrate", "statistics of activations, keys and values, layer by layer")
    _add_calibration_options(parser)
    parser.set_defaults(run=_run_calibrate)


def _run_calibrate(args: argparse.Namespace) -> int:
    from turbotriton.quant.commands import calibrate

    calibrate(_calibration_options(args))
    print(f"statistics: {args.work_dir}")
    return 0


def _add_auto_awq(children: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = _new(children, "auto_awq", "4 bit weights that mind the activations (AWQ), as an AutoAWQ checkpoint")
    _add_calibration_options(parser)
    add = parser.add_argument
    add("--w-bits", type=int, choices=(4,), default=4, help="bits of a weight")
    add("--w-sym", action="store_true", help="symmetric weights (all zeros are 8)")
    add("--w-group-size", type=int, default=128, help="inputs that share a scale (default: %(default)s)")
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument(
        "--search-scale",
        action="store_true",
        help="search the input scales, as the paper does (default: LMDeploy's fixed 0.5 rule)",
    )
    rule.add_argument("--round-to-nearest", action="store_true", help="no input scales at all: for comparison")
    add("--clip", action="store_true", help="search each group's range too")
    parser.set_defaults(run=_run_auto_awq)


def _run_auto_awq(args: argparse.Namespace) -> int:
    from turbotriton.quant.awq import AwqOptions
    from turbotriton.quant.commands import auto_awq

    rule = "search" if args.search_scale else "none" if args.round_to_nearest else "fixed"
    options = AwqOptions(group_size=args.w_group_size, symmetric=args.w_sym, scale_rule=rule, clip=args.clip)
    for line in auto_awq(_calibration_options(args), options):
        print(line)
    print(f"checkpoint: {args.work_dir}")
    print(f"convert it: turbotriton convert NAME {args.work_dir} --model-format awq --group-size {args.w_group_size}")
    return 0


def _add_smooth_quant(children: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = _new(children, "smooth_quant", "8 bit weights for activations quantised on the fly (SmoothQuant W8A8, or FP8)")
    _add_calibration_options(parser)
    add = parser.add_argument
    add(
        "--alpha",
        type=float,
        default=0.5,
        help="how much of the activations' range moves into the weights, 0 to 1 (default: 0.5)",
    )
    add("--quant-dtype", choices=("int8", "fp8"), default="int8", help="type of weights and activations (default: %(default)s)")
    parser.set_defaults(run=_run_smooth_quant)


def _run_smooth_quant(args: argparse.Namespace) -> int:
    from turbotriton.quant.commands import smooth_quant

    smooth_quant(_calibration_options(args), alpha=args.alpha, quant_dtype=args.quant_dtype)
    model_format = "smooth_quant" if args.quant_dtype == "int8" else "fp8"
    print(f"checkpoint: {args.work_dir}")
    print(f"convert it: turbotriton convert NAME {args.work_dir} --model-format {model_format}")
    return 0


def _add_kv_qparams(children: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = _new(children, "kv_qparams", "static scales of keys and values into a workspace, from calibrate's statistics")
    add = parser.add_argument
    add("work_dir", metavar="WORK_DIR", type=Path, help="folder that calibrate, auto_awq or smooth_quant wrote")
    add("turbomind_dir", metavar="TURBOMIND_DIR", type=Path, help="workspace, or its weights folder")
    add("--kv-bits", type=int, choices=(8,), default=8, help="bits of a stored value")
    add("--kv-sym", action="store_true", help="symmetric scales (8 bytes a file, which LMDeploy's own engine cannot load)")
    add("--num-tp", type=int, default=1, help="ranks of the workspace (default: %(default)s)")
    parser.set_defaults(run=_run_kv_qparams)


def _run_kv_qparams(args: argparse.Namespace) -> int:
    from turbotriton.backend.runner.weights import find_weights_dir
    from turbotriton.quant.commands import write_kv_scales

    weights = find_weights_dir(args.turbomind_dir)
    count = write_kv_scales(args.work_dir, weights, symmetric=args.kv_sym, num_tp=args.num_tp)
    print(f"scales: {count} files in {weights}")
    print("used with quant_policy = 4 in its config.ini (8 bit KV with these scales; without the files 4 means 4 bit)")
    return 0


def _add_report(children: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = _new(
        children, "report", "perplexity, KL divergence and top-1 agreement of a quantised workspace against the original"
    )
    add = parser.add_argument
    add("original", metavar="ORIGINAL", type=Path, help="workspace of the 16 or 32 bit model")
    add("quantized", metavar="QUANTIZED", type=Path, help="workspace of the quantised one; may be ORIGINAL, for --quant-policy")
    add("--text", required=True, help="what --calib-dataset takes: a file, a folder, or a name")
    add("--seqlen", type=int, default=512, help="tokens a window (default: %(default)s)")
    add("--num-tokens", type=int, default=32768, help="tokens at most, from the text's beginning (default: %(default)s)")
    add("--quant-policy", type=int, choices=(0, 4, 8, 16), help="KV format of QUANTIZED (default: its config.ini's)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--plot", type=Path, help="write the spread of the divergence as SVG")
    add("--json", type=Path, help="write the numbers")
    parser.set_defaults(run=_run_report)


def _run_report(args: argparse.Namespace) -> int:
    from turbotriton.backend.runner.scoring import Scorer
    from turbotriton.quant.datasets import consecutive_windows, load_documents, load_tokenizer
    from turbotriton.quant.report import compare, plot_svg

    original = Scorer(args.original, args.seqlen, quant_policy=0, device=args.device)
    quantized = Scorer(args.quantized, args.seqlen, quant_policy=args.quant_policy, device=args.device)
    sizes = original.model.vocab_size, quantized.model.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{args.original} has {sizes[0]} tokens and {args.quantized} {sizes[1]}; give two forms of one model")
    tokenizer = load_tokenizer(_tokenizer_folder(args.original))
    windows = consecutive_windows(tokenizer, load_documents(args.text), args.seqlen, args.num_tokens)
    name = f"{args.quantized}" + ("" if args.quant_policy is None else f", quant_policy {args.quant_policy}")
    comparison = compare(name, ((original.logits(w.token_ids), quantized.logits(w.token_ids), w) for w in windows))
    report = comparison.report
    print("\n".join(report.lines()))
    if args.plot:
        _write("--plot", args.plot, plot_svg(comparison))
    if args.json:
        _write("--json", args.json, report.json())
    return 0


def _write(option: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror}); choose another file") from None


def _tokenizer_folder(workspace: Path) -> Path:
    from turbotriton.converter.repository import find_weights

    weights = find_weights(workspace) if workspace.is_dir() else None
    places = [workspace / "triton_models" / "tokenizer", *([weights.parent / "tokenizer"] if weights else [])]
    for place in places:
        if (place / "tokenizer.json").is_file():
            return place
    raise ConfigError(f"{workspace}: holds no tokenizer.json; give the folder that 'turbotriton convert' wrote")
