"""The options of `pipeline` and of a generation, with LMDeploy's names and defaults, and the typed answer.

Every field does what it says, or is refused here by name: nothing is accepted and then ignored.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from turbotriton.contract.errors import ConfigError
from turbotriton.contract.wire import SamplingParams

__all__ = ["EngineOptions", "GenerationConfig", "PytorchEngineConfig", "Response", "TurbomindEngineConfig", "engine_options"]

logger = logging.getLogger(__name__)

MODEL_FORMATS = (None, "hf", "llama", "awq", "gptq", "smooth_quant", "fp8")
_UNBOUNDED = str(2**31 - 1)  # callers of a pipeline bound what is in flight themselves


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How an answer is drawn. `max_new_tokens` None: what is left of session_len."""

    n: int = 1
    max_new_tokens: int | None = 512
    top_p: float = 1.0
    top_k: int = 1
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: Sequence[str] | None = None  # strings; they may span tokens and are not part of the text
    bad_words: Sequence[str] | None = None
    min_new_tokens: int | None = None
    skip_special_tokens: bool = True
    logprobs: int | None = None  # the most likely tokens a step, besides the drawn one

    def __post_init__(self) -> None:
        if self.n != 1:
            raise ConfigError(f"n is {self.n!r}; a Response holds one answer: ask again for another one")
        for name in ("stop_words", "bad_words"):
            words = getattr(self, name)
            if isinstance(words, str) or any(not isinstance(word, str) or not word for word in words or ()):
                raise ConfigError(f"{name} is {words!r}; it must be a list of non-empty strings")

    def sampling(self, stop_token_ids: Sequence[int] = (), bad_sequences: Sequence[tuple[int, ...]] = ()) -> SamplingParams:
        """For the engine; words are the caller's to turn into ids. Raises InvalidInputError for a value out of range."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or 0,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.random_seed,
            stop_token_ids=tuple(stop_token_ids),
            bad_sequences=tuple(bad_sequences),
            ignore_eos=self.ignore_eos,
            num_logprobs=self.logprobs,
        )


@dataclass(slots=True)
class Response:
    """One answer, or while streaming what it grew by: `text`, `token_ids` and `logprobs` are then deltas, the counts are totals.

    finish_reason: None while it grows; "stop" (EOS or a stop word) or "length" at its end.
    """

    text: str
    generate_token_len: int
    input_token_len: int
    session_id: int
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None


@dataclass(frozen=True, slots=True)
class TurbomindEngineConfig:
    """The engine with our kernels on a GPU. Without a GPU it says so and runs the reference ops on the CPU."""

    model_name: str | None = None  # a chat template's name, as `pipeline(model_name=...)`
    model_format: str | None = None  # one of MODEL_FORMATS; None: by the files
    tp: int = 1
    session_len: int | None = None  # None: the workspace's, the named template's, or the model's own
    max_batch_size: int = 128
    cache_max_entry_count: float = 0.8
    cache_block_seq_len: int = 64
    quant_policy: int = 0
    rope_scaling_factor: float = 0.0  # 0: the model's own
    use_logn_attn: bool = False
    download_dir: str | None = None
    revision: str | None = None
    max_prefill_token_num: int = 8192  # most tokens a step; the default leaves a CPU its smaller one
    num_tokens_per_iter: int = 0  # the same, wins when given
    max_prefill_iters: int = 1
    schedule_policy: str | None = None  # ours: fcfs, or lof, the longest output first; None: the workspace's

    def __post_init__(self) -> None:
        _check_common(self.tp, self.max_prefill_token_num)
        if self.model_format not in MODEL_FORMATS:
            formats = ", ".join(str(name) for name in MODEL_FORMATS[1:])
            raise ConfigError(f"model_format is {self.model_format!r}; it must be {formats} or None (by the files)")
        if self.rope_scaling_factor < 0:
            raise ConfigError(f"rope_scaling_factor is {self.rope_scaling_factor}; it must be 0 (the model's own) or positive")
        if self.num_tokens_per_iter < 0:
            raise ConfigError(f"num_tokens_per_iter is {self.num_tokens_per_iter}; it must be 0 (choose) or positive")
        if self.max_prefill_iters != 1:
            raise ConfigError(
                f"max_prefill_iters is {self.max_prefill_iters}; it must be 1: long prompts are always split by num_tokens_per_iter"
            )


@dataclass(frozen=True, slots=True)
class PytorchEngineConfig:
    """The engine with the plain torch reference ops, on any device."""

    model_name: str = ""
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int = 128
    cache_max_entry_count: float = 0.8
    eviction_type: str = "recompute"
    prefill_interval: int = 16
    block_size: int = 64
    num_cpu_blocks: int = 0
    num_gpu_blocks: int = 0  # KV blocks; 0: by cache_max_entry_count
    adapters: dict[str, str] | None = None
    max_prefill_token_num: int = 4096
    thread_safe: bool = False  # a pipeline always is; both values are right
    download_dir: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        _check_common(self.tp, self.max_prefill_token_num)
        if self.adapters:
            raise ConfigError(
                f"adapters names {', '.join(self.adapters)}; LoRA adapters are not part of this version, merge them"
            )
        if self.eviction_type != "recompute":
            raise ConfigError(f"eviction_type is {self.eviction_type!r}; it must be recompute: blocks are not copied to the host")
        if self.num_cpu_blocks:
            raise ConfigError(f"num_cpu_blocks is {self.num_cpu_blocks}; it must be 0: blocks are not copied to the host")
        if self.prefill_interval != 16:
            raise ConfigError(
                f"prefill_interval is {self.prefill_interval}; leave it out: prefill and decode share every step of this engine"
            )
        if self.num_gpu_blocks < 0:
            raise ConfigError(f"num_gpu_blocks is {self.num_gpu_blocks}; it must be 0 (choose) or a number of KV blocks")


def _check_common(tp: int, max_prefill_token_num: int) -> None:
    if tp != 1:
        raise ConfigError(
            f"tp is {tp}; this version runs on one device: set tp to 1 (a workspace of more ranks is joined at load)"
        )
    if max_prefill_token_num < 1:
        raise ConfigError(f"max_prefill_token_num is {max_prefill_token_num}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine and the model's files need of either config. `overrides`: config.ini keys of the engine to their text."""

    overrides: dict[str, str]
    reference_ops: bool
    model_name: str | None
    model_format: str | None
    rope_scaling_factor: float
    use_logn_attn: bool
    download_dir: str | os.PathLike[str] | None
    revision: str | None


def engine_options(
    config: TurbomindEngineConfig | PytorchEngineConfig,
    *,
    model_name: str | None = None,
    revision: str | None = None,
    download_dir: str | os.PathLike[str] | None = None,
) -> EngineOptions:
    """The keywords win over the config's fields. Values out of range are the engine's to refuse (contract.ini.EngineConfig)."""
    values: dict[str, object] = {
        "max_batch_size": config.max_batch_size,
        "cache_max_entry_count": float(config.cache_max_entry_count),
        "max_queued_requests": _UNBOUNDED,
        "max_queued_tokens": _UNBOUNDED,
    }
    if config.session_len is not None:
        values["session_len"] = config.session_len
    budget = 0 if config.max_prefill_token_num == type(config)().max_prefill_token_num else config.max_prefill_token_num
    if isinstance(config, TurbomindEngineConfig):
        values |= {"cache_block_seq_len": config.cache_block_seq_len, "quant_policy": config.quant_policy}
        if config.schedule_policy is not None:
            values["schedule_policy"] = config.schedule_policy
        budget = config.num_tokens_per_iter or budget
    else:
        values["cache_block_seq_len"] = config.block_size
        if config.num_gpu_blocks:
            values["cache_max_entry_count"] = float(config.num_gpu_blocks)
    if budget:
        values["num_tokens_per_iter"] = budget
    is_turbomind = isinstance(config, TurbomindEngineConfig)
    return EngineOptions(
        overrides={name: str(value) for name, value in values.items()},
        reference_ops=not is_turbomind,
        model_name=model_name or config.model_name or None,
        model_format=config.model_format if isinstance(config, TurbomindEngineConfig) else None,
        rope_scaling_factor=config.rope_scaling_factor if isinstance(config, TurbomindEngineConfig) else 0.0,
        use_logn_attn=config.use_logn_attn if isinstance(config, TurbomindEngineConfig) else False,
        download_dir=download_dir if download_dir is not None else config.download_dir,
        revision=revision if revision is not None else config.revision,
    )
