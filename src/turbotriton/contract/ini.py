"""config.ini: LMDeploy's `[llama]` section key for key, ours in `[turbotriton]`, and the configs that the engine runs on.

    config.ini ──read_workspace_config──> WorkspaceConfig(llama, turbotriton) ──┬─ model_config()  what the weights are
                                                                              └─ engine_config() how to run them

`[llama]` holds what LMDeploy v0.4.0 writes, in its order, so that either project serves the other's workspace. What its
format cannot say (qk-norm, tied head, sliding window, llama3 and yarn rope, several EOS ids, engine options) stands in
`[turbotriton]`, every key of which may be missing.
"""

import configparser
import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, WorkspaceError

__all__ = [
    "MODEL_OPTIONS",
    "EngineConfig",
    "LlamaSection",
    "ModelConfig",
    "RopeConfig",
    "TurbotritonSection",
    "WorkspaceConfig",
    "read_workspace_config",
    "write_workspace_config",
]

T = typing.TypeVar("T")

FLOAT_TYPES = ("fp16", "bf16", "fp32")
WEIGHT_TYPES = (*FLOAT_TYPES, "int4", "int8", "fp8")
#: 0: KV in compute_dtype;  8, 4: that many bits, a scale a token and head (4 with scale files in the workspace: docs/weights.md)
QUANT_POLICIES = (0, 4, 8, 16)
COMPUTE_DTYPES = ("auto", "fp16", "bf16", "fp32")
#: Which waiting request is next, beside its priority: first come, first served; or the longest output first, for work that comes at once.
SCHEDULE_POLICIES = ("fcfs", "lof")
MODEL_OPTIONS = ("rope_scaling_factor", "use_logn_attn")  # what a user may change of the model itself
ROPE_SCALING_TYPES = ("none", "linear", "dynamic", "qwen", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class LlamaSection:
    """The `[llama]` keys of LMDeploy v0.4.0 in the order they are written. Flags are 0 or 1."""

    model_name: str
    tensor_para_size: int
    head_num: int
    kv_head_num: int
    vocab_size: int
    num_layer: int
    inter_size: int
    norm_eps: float
    attn_bias: int
    start_id: int
    end_id: int
    session_len: int
    weight_type: str
    rotary_embedding: int = 128
    rope_theta: float = 10000.0
    size_per_head: int = 128
    group_size: int = 0
    max_batch_size: int = 64
    max_context_token_num: int = 1
    step_length: int = 1
    cache_max_entry_count: float = 0.8
    cache_block_seq_len: int = 64
    cache_chunk_size: int = -1
    num_tokens_per_iter: int = 0
    max_prefill_iters: int = 1
    extra_tokens_per_iter: int = 0
    use_context_fmha: int = 1
    quant_policy: int = 0
    max_position_embeddings: int = 0
    rope_scaling_factor: float = 0.0
    use_dynamic_ntk: int = 0
    use_logn_attn: int = 0
    lora_policy: str = ""
    lora_r: int = 0
    lora_scale: float = 0.0
    lora_max_wo_r: int = 0
    lora_rank_pattern: str = ""
    lora_scale_pattern: str = ""


@dataclass(frozen=True, slots=True)
class TurbotritonSection:
    """Our keys. 0, empty or `auto` means: take it from `[llama]` or choose at load."""

    format_version: int = 1
    hidden_size: int = 0  # 0: head_num * size_per_head
    end_ids: str = ""  # comma list: every id that ends a turn; empty: end_id alone
    tie_word_embeddings: int = 0  # 1: no output.weight file, the head is tok_embeddings
    qk_norm: int = 0  # 1: q_norm and k_norm files, RMSNorm over each head before rotary
    sliding_window: int = 0  # keys a query sees, itself included; 0: all
    rope_scaling_type: str = ""  # one of ROPE_SCALING_TYPES; empty: from use_dynamic_ntk and rope_scaling_factor
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn: multiplies cos and sin; 0: 0.1 ln(factor) + 1
    yarn_truncate: int = 1  # yarn: round the correction range to whole dimensions
    float_type: str = "fp16"  # weight_type int8, fp8: type of norms, embeddings, head and biases
    compute_dtype: str = "auto"  # auto: the weights' dtype (int4: fp16; int8, fp8: float_type) on a GPU, fp32 on a CPU
    device: str = "auto"  # auto: cuda if there is one, else cpu
    enable_prefix_caching: int = 1
    cuda_graphs: int = 1  # steps on a GPU replay captured graphs
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4_194_304
    deterministic: int = 0  # 1: outputs bitwise independent of the batch
    schedule_policy: str = "fcfs"  # one of SCHEDULE_POLICIES


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `dim` rotated dimensions a head, in pairs (i, i + dim/2) as Hugging Face orders them."""

    dim: int
    theta: float
    scaling_type: str = "none"
    factor: float = 1.0
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    yarn_truncate: bool = True

    def theta_for(self, limit_len: int) -> float:
        """Rotary base of a request whose sequence may grow to `limit_len` tokens (fixed at its start, as TurboMind does).

        dynamic: with s = factor, M = max_position_embeddings, L = limit_len > M:  f = s L / M - (s - 1);  theta f^(d/(d-2)).
        qwen:    alpha = 2^ceil(log2(L / M) + 1) - 1 for L > M;                    theta alpha^(d/(d-2)).
        Other types do not depend on the request.
        """
        if self.scaling_type not in ("dynamic", "qwen") or limit_len <= self.max_position_embeddings:
            return self.theta
        ratio = limit_len / self.max_position_embeddings
        if self.scaling_type == "dynamic":
            scale = self.factor * ratio - (self.factor - 1)
        else:
            scale = max(2.0 ** math.ceil(math.log2(ratio) + 1) - 1, 1.0)
        return float(self.theta * scale ** (self.dim / (self.dim - 2)))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the weights are. The decoder reads nothing else: it knows no architecture name."""

    model_name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inter_size: int
    vocab_size: int
    norm_eps: float
    attn_bias: bool
    weight_type: str
    group_size: int
    tp: int  # ranks that the files are split for
    rope: RopeConfig
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    qk_norm: bool
    sliding_window: int  # 0: off
    use_logn_attn: bool  # q *= max(1, ln(position + 1) / ln(max_position_embeddings))
    float_type: str = "fp16"  # of what is not quantised; weight_type itself where that is one

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "inter_size", "vocab_size", "tp"):
            if getattr(self, name) < 1:
                raise WorkspaceError(f"config.ini: {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise WorkspaceError(f"config.ini: head_num {self.num_heads} is no multiple of kv_head_num {self.num_kv_heads}")
        if self.weight_type not in WEIGHT_TYPES:
            raise WorkspaceError(f"config.ini: weight_type is {self.weight_type!r}; this version reads {', '.join(WEIGHT_TYPES)}")
        if self.float_type not in FLOAT_TYPES:
            raise WorkspaceError(f"config.ini: float_type is {self.float_type!r}; it must be one of {', '.join(FLOAT_TYPES)}")
        if self.weight_type == "int4" and self.group_size < 1:
            raise WorkspaceError(f"config.ini: group_size is {self.group_size}; int4 weights need it, usually 128")
        if self.rope.scaling_type not in ROPE_SCALING_TYPES:
            raise WorkspaceError(
                f"config.ini: rope_scaling_type is {self.rope.scaling_type!r}; it must be one of {', '.join(ROPE_SCALING_TYPES)}"
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to run the weights. Built from config.ini, then `TURBOTRITON_*` variables; validated here once."""

    session_len: int
    max_batch_size: int = 64  # most requests running at once
    cache_max_entry_count: float = 0.8  # below 1: share of free device memory for KV; >= 1: number of blocks
    cache_block_seq_len: int = 64  # tokens a KV block
    num_tokens_per_iter: int = 0  # token budget of a step; 0: 8192 on a GPU, 512 on a CPU
    quant_policy: int = 0  # one of QUANT_POLICIES
    compute_dtype: str = "auto"
    device: str = "auto"
    enable_prefix_caching: bool = True
    cuda_graphs: bool = True  # without a GPU there are none
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4_194_304
    deterministic: bool = False
    schedule_policy: str = "fcfs"  # one of SCHEDULE_POLICIES

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

        check(self.session_len >= 2, "session_len", "at least 2 tokens")
        check(1 <= self.max_batch_size <= 4096, "max_batch_size", "from 1 to 4096")
        check(
            math.isfinite(self.cache_max_entry_count) and self.cache_max_entry_count > 0,
            "cache_max_entry_count",
            "a share of free memory in (0, 1) or a number of blocks >= 1",
        )
        check(
            1 <= self.cache_block_seq_len <= 1024 and self.cache_block_seq_len & (self.cache_block_seq_len - 1) == 0,
            "cache_block_seq_len",
            "a power of two from 1 to 1024",
        )
        check(self.num_tokens_per_iter >= 0, "num_tokens_per_iter", "0 (choose) or a positive token count")
        check(self.quant_policy in QUANT_POLICIES, "quant_policy", "0 (16 or 32 bit KV), 8 (int8), 16 (fp8) or 4 (4 bit)")
        check(self.compute_dtype in COMPUTE_DTYPES, "compute_dtype", f"one of {', '.join(COMPUTE_DTYPES)}")
        check(
            self.device in ("auto", "cpu", "cuda") or (self.device.startswith("cuda:") and self.device[5:].isdigit()),
            "device",
            "auto, cpu, cuda or cuda:N",
        )
        check(self.max_queued_requests >= 1, "max_queued_requests", "at least 1")
        check(self.max_queued_tokens >= 1, "max_queued_tokens", "at least 1")
        check(self.schedule_policy in SCHEDULE_POLICIES, "schedule_policy", f"one of {', '.join(SCHEDULE_POLICIES)}")


@dataclass(frozen=True, slots=True)
class WorkspaceConfig:
    llama: LlamaSection
    turbotriton: TurbotritonSection = dataclasses.field(default_factory=TurbotritonSection)

    def model_config(self) -> ModelConfig:
        """Raises WorkspaceError when the sections contradict each other."""
        lm, tt = self.llama, self.turbotriton
        scaling = tt.rope_scaling_type or _implied_rope_scaling(lm)
        max_position = lm.max_position_embeddings or 2048
        end_ids = _int_list("end_ids", tt.end_ids) or (lm.end_id,)
        return ModelConfig(
            model_name=lm.model_name,
            num_layers=lm.num_layer,
            hidden_size=tt.hidden_size or lm.head_num * lm.size_per_head,
            num_heads=lm.head_num,
            num_kv_heads=lm.kv_head_num or lm.head_num,
            head_dim=lm.size_per_head,
            inter_size=lm.inter_size,
            vocab_size=lm.vocab_size,
            norm_eps=lm.norm_eps,
            attn_bias=bool(lm.attn_bias),
            weight_type=lm.weight_type,
            group_size=lm.group_size,
            tp=lm.tensor_para_size,
            rope=RopeConfig(
                dim=lm.rotary_embedding,
                theta=lm.rope_theta or 10000.0,
                scaling_type=scaling,
                factor=lm.rope_scaling_factor or 1.0,
                max_position_embeddings=max_position,
                original_max_position_embeddings=tt.original_max_position_embeddings or max_position,
                low_freq_factor=tt.low_freq_factor,
                high_freq_factor=tt.high_freq_factor,
                beta_fast=tt.beta_fast,
                beta_slow=tt.beta_slow,
                attention_factor=tt.attention_factor,
                yarn_truncate=bool(tt.yarn_truncate),
            ),
            bos_token_id=lm.start_id,
            eos_token_ids=end_ids,
            tie_word_embeddings=bool(tt.tie_word_embeddings),
            qk_norm=bool(tt.qk_norm),
            sliding_window=tt.sliding_window,
            use_logn_attn=bool(lm.use_logn_attn),
            float_type=_float_type(lm.weight_type, tt.float_type),
        )

    def with_model_options(self, override: Callable[[str], str | None]) -> "WorkspaceConfig":
        """With what a user may change of the model itself: rope_scaling_factor (0: nothing) and use_logn_attn. Raises ConfigError."""
        given = {name: _parse(name, LlamaSection, text) for name in MODEL_OPTIONS if (text := override(name))}
        ours = self.turbotriton
        if not given.get("rope_scaling_factor"):
            given.pop("rope_scaling_factor", None)
        elif ours.rope_scaling_type == "none":
            ours = dataclasses.replace(ours, rope_scaling_type="")  # then the factor says which, as in LMDeploy's files
        return WorkspaceConfig(dataclasses.replace(self.llama, **given), ours)  # type: ignore[arg-type]

    def engine_config(self, override: Callable[[str], str | None] = lambda name: None) -> EngineConfig:
        """`override(name)` gives the text that replaces a key (contract.env.engine_option in the engine process), or None.

        Raises ConfigError naming the key.
        """
        lm, tt = self.llama, self.turbotriton
        values: dict[str, object] = {}
        for field in dataclasses.fields(EngineConfig):
            text = override(field.name)
            if text is not None:
                values[field.name] = _parse(field.name, EngineConfig, text)
            elif hasattr(lm, field.name):
                values[field.name] = getattr(lm, field.name)
            else:
                values[field.name] = getattr(tt, field.name)
        if not values["session_len"]:
            values["session_len"] = lm.max_position_embeddings or 2048
        for name in ("enable_prefix_caching", "cuda_graphs", "deterministic"):
            values[name] = bool(values[name])
        return EngineConfig(**values)  # type: ignore[arg-type]


def _float_type(weight_type: str, stated: str) -> str:
    if weight_type in FLOAT_TYPES:
        return weight_type
    return "fp16" if weight_type == "int4" else stated


def _implied_rope_scaling(llama: LlamaSection) -> str:
    """What LMDeploy's engine would do: dynamic NTK needs a factor of 1 or more; any other positive factor is linear."""
    if llama.use_dynamic_ntk:
        return "dynamic" if llama.rope_scaling_factor >= 1 else "none"
    return "linear" if llama.rope_scaling_factor > 0 else "none"


def _int_list(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise WorkspaceError(f"config.ini: {name} is {text!r}; it must be a comma list of token ids") from None


def _parse(name: str, owner: type, text: str) -> object:
    kind = typing.get_type_hints(owner)[name]
    try:
        if kind is bool:
            return {"0": False, "1": True, "false": False, "true": True}[text.strip().lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{name} is {text!r}; it must be of type {kind.__name__}") from None


def read_workspace_config(path: Path) -> WorkspaceConfig:
    """Reads config.ini at `path`. Unknown keys are left alone (newer writers), missing required ones raise WorkspaceError."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except OSError as error:
        raise WorkspaceError(
            f"{path}: cannot be read ({error.strerror}); is this a workspace made by 'turbotriton convert'?"
        ) from None
    except (configparser.Error, UnicodeDecodeError) as error:
        raise WorkspaceError(f"{path}: is no config.ini ({str(error).splitlines()[0]})") from None
    if not parser.has_section("llama"):
        raise WorkspaceError(f"{path}: has no [llama] section")
    ours = parser["turbotriton"] if parser.has_section("turbotriton") else {}
    try:
        return WorkspaceConfig(_section(LlamaSection, parser["llama"]), _section(TurbotritonSection, ours))
    except ConfigError as error:
        raise WorkspaceError(f"{path}: {error}") from None


def _section(owner: type[T], values: Mapping[str, str]) -> T:
    found: dict[str, object] = {}
    for field in dataclasses.fields(owner):  # type: ignore[arg-type]
        if field.name in values:
            found[field.name] = _parse(field.name, owner, values[field.name])
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"key {field.name} is missing")
    return owner(**found)


def write_workspace_config(path: Path, config: WorkspaceConfig) -> None:
    """Writes both sections with configparser, as LMDeploy does: `key = value`, one blank line after a section."""
    parser = configparser.ConfigParser(interpolation=None)
    parser["llama"] = {name: str(value) for name, value in dataclasses.asdict(config.llama).items()}
    parser["turbotriton"] = {name: str(value) for name, value in dataclasses.asdict(config.turbotriton).items()}
    with open(path, "w", encoding="utf-8") as file:
        parser.write(file)
