"""`turbotriton convert`: a checkpoint to a workspace, or a workspace's files against its manifest."""

import argparse
from pathlib import Path

from turbotriton.contract.errors import ConfigError

from .hub import MODEL_FORMATS, add_hub_options, resolve_model_path

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "convert",
        help="turn a checkpoint into a workspace that tritonserver serves",
        description="Turn a Hugging Face, Meta or quantised checkpoint (AutoAWQ, GPTQ, SmoothQuant, FP8) into a workspace with "
        "TurboMind weight files.",
    )
    add = parser.add_argument
    add("model_name", metavar="MODEL_NAME", nargs="?", help="name of the model; LMDeploy's names also set its session_len")
    add("model_path", metavar="MODEL_PATH", nargs="?", help="folder of the checkpoint, or its hub id")
    add(
        "--model-format",
        choices=MODEL_FORMATS,
        help="format of the checkpoint (default: by its files)",
    )
    add("--tp", type=int, default=1, help="ranks to split the weights for, a power of two")
    add("--tokenizer-path", type=Path, help="tokenizer file or folder, where the checkpoint has none")
    add("--dst-path", type=Path, default=Path("workspace"), help="folder of the workspace")
    add("--quant-path", type=Path, help="folder or file of the quantised weights, if they are not in MODEL_PATH")
    add("--group-size", type=int, default=0, help="group size of int4 weights (0: by config.json)")
    add(
        "--dtype",
        choices=("auto", "fp16", "bf16", "fp32"),
        default="auto",
        help="type of the weights; auto: bf16 where the model is",
    )
    add("--served-name", default="", help="name of the text door (default: MODEL_NAME)")
    add("--doors", choices=("all", "text"), default="all", help="text: without the three models of LMDeploy's contract")
    add("--trust-remote-code", action="store_true", help="copy the checkpoint's *.py files too (nothing of them is run here)")
    add("--overwrite", action="store_true", help="replace a workspace at --dst-path")
    add("--verify", action="store_true", help="hash the workspace's files against its manifest; alone: convert nothing")
    add_hub_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from turbotriton.converter.convert import ConvertOptions, convert_checkpoint
    from turbotriton.converter.repository import find_weights
    from turbotriton.converter.writer import verify_weights

    if args.model_name is None and not args.verify:
        raise ConfigError("MODEL_NAME and MODEL_PATH are missing; see turbotriton convert --help")
    if args.model_name is not None:
        if Path(args.model_name).is_dir() and not (args.model_path and Path(args.model_path).is_dir()):
            raise ConfigError(
                f"MODEL_NAME is {args.model_name!r}, which is a folder: the name comes first, then the checkpoint's folder, such as: "
                f"turbotriton convert {Path(args.model_name).resolve().name} {args.model_name}"
            )
        if args.model_path is None:
            raise ConfigError(f"MODEL_PATH is missing after MODEL_NAME {args.model_name!r}; give the checkpoint's folder")
        args.model_path = resolve_model_path(args.model_path, args)
        names = ("model_name", "model_path", "dst_path", "model_format", "tp", "tokenizer_path", "quant_path", "group_size")
        more = ("dtype", "served_name", "doors", "trust_remote_code", "overwrite")
        layout = convert_checkpoint(ConvertOptions(**{name: getattr(args, name) for name in (*names, *more)}))
        print(f"workspace: {layout.root}")
        print(f"serve it:  turbotriton serve tritonserver {layout.root}")
    if args.verify:
        weights = find_weights(args.dst_path) if args.dst_path.is_dir() else None
        if weights is None:
            raise ConfigError(f"--dst-path {args.dst_path}: holds no workspace to verify")
        print(f"verified:  {verify_weights(weights)} files in {weights}")
    return 0
