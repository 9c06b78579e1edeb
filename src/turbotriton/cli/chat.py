"""`turbotriton chat MODEL_PATH`: a terminal chat with a model in this process."""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from turbotriton.contract.chat_templates import ChatTemplateConfig
from turbotriton.contract.errors import ConfigError, InvalidInputError

from .hub import MODEL_FORMATS, MODEL_PATH_HELP, add_hub_options
from .template_options import add_template_options, template_config

if TYPE_CHECKING:
    from turbotriton.backend.pipeline.inference import Pipeline
    from turbotriton.backend.pipeline.options import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig

__all__ = ["add_parser"]

BACKENDS = {"turbomind": "turbomind", "pytorch": "pytorch", "torch": "pytorch"}
LOG_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "chat",
        help="chat in the terminal with a model in this process",
        description="Chat in the terminal with a model in this process, without a server. Enter sends a line, Ctrl-C stops an "
        "answer, /help lists the rest. Input that is no terminal: one question a line. A checkpoint is converted into the "
        "cache first. The older forms 'chat torch MODEL_PATH' and 'chat turbomind MODEL_PATH' choose the backend too.",
    )
    parser.add_argument("words", metavar="MODEL_PATH", nargs="+", help=MODEL_PATH_HELP)
    _add_model_options(parser)
    template = add_template_options(parser)
    template.add_argument("--model-name", help="a template's name, as 'turbotriton list' prints them")
    _add_answer_options(parser)
    add_hub_options(parser)
    parser.set_defaults(run=run)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--backend",
        choices=("turbomind", "pytorch"),
        help="turbomind: our kernels, without a GPU the reference ops; pytorch: the reference ops (default: turbomind)",
    )
    add("--session-len", type=int, help="most tokens of the conversation (default: the model's)")
    add("--max-batch-size", type=int, default=128, help="most requests running at once")
    add("--cache-max-entry-count", type=float, default=0.8, help="KV cache: share of free memory below 1, else number of blocks")
    add("--model-format", choices=MODEL_FORMATS, help="format of a checkpoint (default: by its files)")
    add("--quant-policy", type=int, choices=(0, 4, 8, 16), default=0, help="KV cache: 8 int8, 16 fp8, 4 int4, 0 as the weights")
    add("--rope-scaling-factor", type=float, default=0.0, help="0: the model's own")
    add("--tp", type=int, default=1, help="GPUs; this version runs on one")
    add("--adapters", nargs="*", help="LoRA adapters; not part of this version")
    add("--trust-remote-code", action="store_true", help="no effect: a checkpoint's code is neither needed nor run")
    add("--log-level", choices=LOG_LEVELS, default="WARNING", help="what is logged to standard error")


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("answers").add_argument
    add("--once", metavar="QUESTION", help="ask one question, print the answer, leave")
    add("--multiline", action="store_true", help="a blank line sends, not Enter (/multi switches)")
    add("--no-stream", dest="stream", action="store_false", help="print each answer when it is complete")
    add("--max-tokens", type=int, default=512, help="most tokens in one answer")
    add("--temperature", type=float, default=0.8, help="0: greedy")
    add("--top-p", type=float, default=0.8, help="share of the probability that is drawn from")
    add("--top-k", type=int, default=40, help="tokens that are drawn from; 1: greedy; 0: off")
    add("--repetition-penalty", type=float, default=1.0, help="1: off")
    add("--seed", type=int, help="of the sampling (default: drawn)")


def run(args: argparse.Namespace) -> int:
    backend, model_path = _backend_and_path(args)
    if args.adapters:
        raise ConfigError(f"--adapters is {' '.join(args.adapters)!r}; LoRA adapters are not part of this version, merge them")
    from turbotriton.backend.pipeline import loading
    from turbotriton.backend.pipeline.options import engine_options
    from turbotriton.client.terminal import Terminal

    logging.getLogger("turbotriton").setLevel(args.log_level)
    options = engine_options(
        _engine_config(args, backend), model_name=args.model_name, revision=args.revision, download_dir=args.download_dir
    )
    gen_config, template = _gen_config(args), _template_config(args)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", UserWarning)
        pipe = loading.load_pipeline(model_path, options, template)
    for warning in noted:
        print(f"turbotriton: note: {warning.message}", file=sys.stderr)
    with pipe:
        conversation = _Conversation(pipe, gen_config)
        terminal = Terminal(
            conversation,
            conversation.describe,
            stream=args.stream,
            multiline=args.multiline,
            stdin=sys.stdin,
            out=sys.stdout,
        )
        if args.once is not None:
            terminal.answer(args.once)
            return 0
        info = pipe.model.engine.info
        return terminal.chat(f"{model_path} on {info.device}, {info.session_len} tokens, {pipe.model.prompt_format.name}")


def _backend_and_path(args: argparse.Namespace) -> tuple[str, str]:
    """`chat [torch|pytorch|turbomind] MODEL_PATH`."""
    *first, model_path = args.words
    if not first:
        return args.backend or "turbomind", model_path
    backend = BACKENDS.get(first[0])
    if backend is None or len(first) > 1:
        raise InvalidInputError(f"{' '.join(args.words)!r} is more than one MODEL_PATH; give one (quote a path with spaces)")
    if args.backend not in (None, backend):
        raise ConfigError(f"--backend is {args.backend}, but the command says 'chat {first[0]}'; give one of them")
    return backend, model_path


def _engine_config(args: argparse.Namespace, backend: str) -> "TurbomindEngineConfig | PytorchEngineConfig":
    from turbotriton.backend.pipeline.options import PytorchEngineConfig, TurbomindEngineConfig

    common = {name: getattr(args, name) for name in ("tp", "session_len", "max_batch_size", "cache_max_entry_count")}
    special = {"model_format": None, "quant_policy": 0, "rope_scaling_factor": 0.0}
    if backend == "turbomind":
        return TurbomindEngineConfig(**common, **{name: getattr(args, name) for name in special})
    for name, default in special.items():
        if getattr(args, name) != default:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; --backend pytorch has no such option, leave it out"
            )
    return PytorchEngineConfig(**common)


def _template_config(args: argparse.Namespace) -> ChatTemplateConfig | None:
    config = template_config(args)
    if args.model_name is not None and config is not None and config.model_name is not None:
        raise ConfigError(f"--model-name is {args.model_name!r} and --chat-template names {config.model_name!r}; give one")
    return config


def _gen_config(args: argparse.Namespace) -> "GenerationConfig":
    from turbotriton.backend.pipeline.options import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=args.max_tokens,
        top_p=args.top_p,
        top_k=args.top_k,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
        random_seed=args.seed,
    )
    config.sampling()  # a value out of range is refused before the model is loaded
    return config


class _Conversation:
    """A pipeline's session as the terminal wants it (`client/terminal.py: Conversation`)."""

    def __init__(self, pipe: "Pipeline", gen_config: "GenerationConfig") -> None:
        self._pipe = pipe
        self._gen_config = gen_config
        self._session = pipe.session()
        self._about: str | None = None

    def ask(self, question: str) -> Iterator[str]:
        session, began = self._session, time.monotonic()
        first: float | None = None
        self._about = None
        for delta in session.ask(question, self._gen_config):
            if first is None and delta.generate_token_len:
                first = time.monotonic()
            if delta.text:
                yield delta.text
        response = session.response
        assert response is not None
        if response.finish_reason == "length" and not response.generate_token_len:
            raise InvalidInputError(
                f"the conversation has {response.input_token_len} tokens and session_len is {self._pipe.session_len}; "
                "type end to begin a new one, or start with a larger --session-len"
            )
        end, count = time.monotonic(), response.generate_token_len
        decode_s = end - first if first is not None and count > 1 else end - began
        speed = (count - 1 if count > 1 else count) / max(decode_s, 1e-9)
        self._about = (
            f"[{'cancelled, ' if session.is_cancelled else ''}{count} tokens, {speed:.1f} tokens/s"
            f"{'' if first is None else f', first token after {first - began:.2f} s'}; "
            f"prompt of {response.input_token_len}, {session.num_cached_tokens} of them cached]"
        )

    def describe(self) -> str | None:
        return self._about

    def cancel(self) -> None:
        self._session.cancel()

    def end(self) -> None:
        self._session.close()
        self._session = self._pipe.session()
