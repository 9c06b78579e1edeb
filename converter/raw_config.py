"""A checkpoint's config.json (or Meta's params.json) read into one frozen description, whatever its vintage.

transformers 5 renamed keys (`rope_parameters` holds type and theta, `dtype` for `torch_dtype`, `layer_types` for windows); both
forms are accepted. What the decoder cannot compute is refused here, with the key's name.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbotriton.contract.errors import CheckpointError

__all__ = ["CheckpointConfig", "ConfigFile", "RopeScaling", "read_huggingface", "read_meta", "read_qwen"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    type: str = "none"  # one of contract.ini.ROPE_SCALING_TYPES
    factor: float = 0.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Sizes and flags. `vocab_size` is 0 where the file does not say it (Meta): the embedding's rows then decide."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inter_size: int  # 0: w1's rows decide (Meta)
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_position_embeddings: int  # 0: the file does not say it
    rope: RopeScaling = field(default_factory=RopeScaling)
    sliding_window: int = 0
    tie_word_embeddings: bool = False
    use_dynamic_ntk: bool = False
    use_logn_attn: bool = False
    dtype: str = ""  # torch_dtype as the file says it, without "torch."
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


class ConfigFile:
    """Typed look-ups in one JSON object that name the file and the key when they fail."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); is this a model folder?") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: is no JSON ({error}); download it again") from None
        if not isinstance(self.values, dict):
            raise CheckpointError(f"{path}: is no JSON object; download it again")

    def error(self, key: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key}: expected {expected}, found {found!r}")

    def first(self, names: Iterable[str]) -> Any:
        """Value of the first of `names` that is there and not null."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def size(self, *names: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.first(names)
        if value is None:
            if default is None:
                raise self.error(names[0], "a positive integer", None)
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(names[0], "a positive integer", value)
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        value = self.first(names)
        if value is None and default is not None:
            return default
        return _number(self, names[0], value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value not in (None, False, True):
            raise self.error(name, "true or false", value)
        return bool(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and i >= 0 for i in ids):
            raise self.error(name, "a token id or a list of them", value)
        return tuple(ids)


def _number(file: ConfigFile, key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise file.error(key, "a number", value)
    return float(value)


def read_huggingface(file: ConfigFile, *, default_sliding_window: int = 0) -> CheckpointConfig:
    """Every family but Qwen v1 and Meta. `default_sliding_window` holds when the key is absent (Mistral), not when it is null."""
    _refuse(file, "hidden_act", ("silu", "swish"))
    _refuse(file, "mlp_bias", (False,))
    _refuse(file, "partial_rotary_factor", (1.0,))
    hidden, heads = file.size("hidden_size"), file.size("num_attention_heads")
    kv_heads = file.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise file.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}", kv_heads)
    if file.values.get("head_dim") is None and hidden % heads:
        raise file.error("hidden_size", f"a multiple of num_attention_heads {heads}", hidden)
    layers = file.size("num_hidden_layers")
    max_position = file.size("max_position_embeddings", default=0)
    theta, scaling = _rope(file, max_position)
    return CheckpointConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=file.size("head_dim", default=hidden // heads),
        inter_size=file.size("intermediate_size"),
        vocab_size=file.size("vocab_size"),
        norm_eps=file.number("rms_norm_eps"),
        rope_theta=theta,
        max_position_embeddings=max_position,
        rope=scaling,
        sliding_window=_sliding_window(file, layers, default_sliding_window),
        tie_word_embeddings=file.flag("tie_word_embeddings"),
        use_dynamic_ntk=scaling.type == "dynamic",
        dtype=_dtype(file),
        bos_token_id=next(iter(file.token_ids("bos_token_id")), None),
        eos_token_ids=file.token_ids("eos_token_id"),
    )


def read_qwen(file: ConfigFile) -> CheckpointConfig:
    """Qwen v1: its first releases have GPT-2's key names; the feed-forward size is twice one projection's."""
    _refuse(file, "no_bias", (True,))
    _refuse(file, "rotary_pct", (1.0,))
    hidden, heads = file.size("hidden_size", "n_embd"), file.size("num_attention_heads", "n_head")
    head_dim = file.size("kv_channels", default=hidden // heads)
    doubled = file.size("intermediate_size", "ffn_hidden_size")
    if doubled % 2:
        raise file.error("intermediate_size", "an even number (gate and up projection together)", doubled)
    use_dynamic_ntk = file.flag("use_dynamic_ntk")
    return CheckpointConfig(
        num_layers=file.size("num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        inter_size=doubled // 2,
        vocab_size=file.size("vocab_size"),
        norm_eps=file.number("layer_norm_epsilon"),
        rope_theta=file.number("rotary_emb_base", default=10000.0),
        max_position_embeddings=file.size("seq_length", "max_position_embeddings", "n_positions"),
        rope=RopeScaling("qwen" if use_dynamic_ntk else "none"),
        tie_word_embeddings=file.flag("tie_word_embeddings"),
        use_dynamic_ntk=use_dynamic_ntk,
        use_logn_attn=file.flag("use_logn_attn"),
        dtype=_dtype(file),
    )


def read_meta(file: ConfigFile) -> CheckpointConfig:
    """params.json. LMDeploy writes max_position_embeddings 0 for this format. Llama 3.1's scaled rope is a flag without numbers:
    8192 positions stretched by 8 (or `rope_scaling_factor`), low 1, high 4."""
    hidden, heads = file.size("dim"), file.size("n_heads", default=32)
    scaling = RopeScaling()
    if file.flag("use_scaled_rope"):
        factor = file.number("rope_scaling_factor", default=8.0)
        scaling = RopeScaling("llama3", factor, original_max_position_embeddings=8192)
    return CheckpointConfig(
        num_layers=file.size("n_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=file.size("n_kv_heads", default=heads),
        head_dim=hidden // heads,
        inter_size=0,
        vocab_size=0,
        norm_eps=file.number("norm_eps"),
        rope_theta=file.number("rope_theta", default=10000.0),
        max_position_embeddings=0,
        rope=scaling,
    )


def _refuse(file: ConfigFile, key: str, allowed: tuple[object, ...]) -> None:
    value = file.values.get(key)
    if value is not None and value not in allowed:
        raise file.error(key, " or ".join(repr(a) for a in allowed) + " (nothing else is supported)", value)


def _dtype(file: ConfigFile) -> str:
    return str(file.first(("torch_dtype", "dtype")) or "").removeprefix("torch.")


def _sliding_window(file: ConfigFile, num_layers: int, default: int) -> int:
    """The window that all layers share, 0 for none. Layers that differ are refused."""
    window = file.values.get("sliding_window", default)
    kinds = file.values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or set(kinds) - {"full_attention", "sliding_attention"}:
            raise file.error("layer_types", "full_attention or sliding_attention for each layer", kinds)
        windowed = kinds.count("sliding_attention")
    elif "use_sliding_window" in file.values:
        first = file.values.get("max_window_layers") or 0
        windowed = max(0, num_layers - first) if file.flag("use_sliding_window") else 0
    else:
        windowed = num_layers
    if not windowed or not window:
        return 0
    if windowed != num_layers:
        raise file.error("sliding_window", "the same attention in all layers", f"a window in {windowed} of {num_layers} layers")
    if not isinstance(window, int) or window < 1:
        raise file.error("sliding_window", "a positive integer or null", window)
    return window


def _rope(file: ConfigFile, max_position: int) -> tuple[float, RopeScaling]:
    """(theta, scaling) from `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`."""
    raw = file.first(("rope_parameters", "rope_scaling"))
    if raw is None:
        return file.number("rope_theta", default=10000.0), RopeScaling()
    key = "rope_parameters" if file.values.get("rope_parameters") is not None else "rope_scaling"
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise file.error(key, "one object of numbers for all layers", raw)

    def number(name: str, default: float) -> float:
        value = raw.get(name)
        return default if value is None else _number(file, f"{key}.{name}", value)

    theta = number("rope_theta", file.number("rope_theta", default=10000.0))
    if number("partial_rotary_factor", 1.0) != 1.0:
        raise file.error(f"{key}.partial_rotary_factor", "1.0 (nothing else is supported)", raw["partial_rotary_factor"])
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise file.error(f"{key}.type", "default, linear, dynamic, llama3 or yarn", kind)
    if raw.get("factor") is None:
        raise file.error(f"{key}.factor", "a number", None)
    factor = number("factor", 1.0)
    if factor <= 0:
        raise file.error(f"{key}.factor", "a positive number", factor)
    if kind == "llama3" and not raw.get("original_max_position_embeddings"):
        raise file.error(f"{key}.original_max_position_embeddings", "a positive integer", None)
    original = int(number("original_max_position_embeddings", max_position)) if kind in ("llama3", "yarn") else 0
    return theta, RopeScaling(
        type=kind,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=number("low_freq_factor", 1.0),
        high_freq_factor=number("high_freq_factor", 4.0),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(number, factor) if kind == "yarn" else 0.0,
        truncate=bool(raw.get("truncate", True)),
    )


def _yarn_attention_factor(number: Callable[[str, float], float], factor: float) -> float:
    """YaRN's magnitude: given, or the ratio of mscale's two forms, or 0 for the engine's default 0.1 ln(factor) + 1."""
    given = number("attention_factor", 0.0)
    mscale, mscale_all = number("mscale", 0.0), number("mscale_all_dim", 0.0)
    if given or not (mscale and mscale_all):
        return given
    if factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
