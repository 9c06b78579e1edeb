"""Architectures as rows: `architectures[0]` of config.json -> where its tensors are and how they differ from Llama's.

The converter's other modules know these flags and no architecture's name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from turbotriton.contract.errors import CheckpointError

from .raw_config import CheckpointConfig, ConfigFile, read_huggingface, read_meta, read_qwen

__all__ = ["ARCHITECTURES", "META_LLAMA", "Architecture", "TensorNames", "find_architecture"]


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Prefixes of the source's tensors: `.weight`, `.bias`, `.qweight`... is appended; `{i}` is the layer.

    `qkv` is either three prefixes (q, k, v) or one packed projection.
    """

    embedding: str
    norm: str
    head: str
    attention_norm: str
    ffn_norm: str
    qkv: tuple[str, ...]
    o: str
    w1: str  # gate: the one that goes through SiLU
    w3: str  # up
    w2: str  # down
    q_norm: str = ""
    k_norm: str = ""
    unused: tuple[str, ...] = ("rotary_emb.inv_freq", "rope.freqs")  # name endings that carry no weights


@dataclass(frozen=True, slots=True)
class Architecture:
    name: str
    names: TensorNames
    read_config: Callable[[ConfigFile], CheckpointConfig] = read_huggingface
    packing: str = "separate"  # q, k, v | "stacked": [q; k; v] | "grouped": per KV head its q heads, then k, then v
    qkv_bias: str = "optional"  # "optional": where the first layer has one | "required"
    o_bias: str = "with_qkv"  # "with_qkv": present exactly when q has one | "zeros": made up, as LMDeploy does
    qk_norm: bool = False
    normalized_head: bool = False  # rows of the head are scaled to L2 norm 1
    interleaved_rotary: bool = False  # source q and k rows are already in pairs (Meta)
    bf16_always: bool = False  # LMDeploy ignores this family's torch_dtype
    token_ids: tuple[int, int] | None = None  # (start_id, end_id) that LMDeploy fixes for the family
    refuse: Callable[[CheckpointConfig], str] = lambda config: ""  # why this model cannot be converted, or ""


_LLAMA_NAMES = TensorNames(
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    attention_norm="model.layers.{i}.input_layernorm",
    ffn_norm="model.layers.{i}.post_attention_layernorm",
    qkv=tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    o="model.layers.{i}.self_attn.o_proj",
    w1="model.layers.{i}.mlp.gate_proj",
    w3="model.layers.{i}.mlp.up_proj",
    w2="model.layers.{i}.mlp.down_proj",
    q_norm="model.layers.{i}.self_attn.q_norm",
    k_norm="model.layers.{i}.self_attn.k_norm",
)

_BAICHUAN_NAMES = TensorNames(
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    attention_norm="model.layers.{i}.input_layernorm",
    ffn_norm="model.layers.{i}.post_attention_layernorm",
    qkv=("model.layers.{i}.self_attn.W_pack",),
    o="model.layers.{i}.self_attn.o_proj",
    w1="model.layers.{i}.mlp.gate_proj",
    w3="model.layers.{i}.mlp.up_proj",
    w2="model.layers.{i}.mlp.down_proj",
)

_INTERNLM2_NAMES = TensorNames(
    embedding="model.tok_embeddings",
    norm="model.norm",
    head="output",
    attention_norm="model.layers.{i}.attention_norm",
    ffn_norm="model.layers.{i}.ffn_norm",
    qkv=("model.layers.{i}.attention.wqkv",),
    o="model.layers.{i}.attention.wo",
    w1="model.layers.{i}.feed_forward.w1",
    w3="model.layers.{i}.feed_forward.w3",
    w2="model.layers.{i}.feed_forward.w2",
)

_QWEN_NAMES = TensorNames(
    embedding="transformer.wte",
    norm="transformer.ln_f",
    head="lm_head",
    attention_norm="transformer.h.{i}.ln_1",
    ffn_norm="transformer.h.{i}.ln_2",
    qkv=("transformer.h.{i}.attn.c_attn",),
    o="transformer.h.{i}.attn.c_proj",
    w1="transformer.h.{i}.mlp.w2",
    w3="transformer.h.{i}.mlp.w1",
    w2="transformer.h.{i}.mlp.c_proj",
)

_META_NAMES = TensorNames(
    embedding="tok_embeddings",
    norm="norm",
    head="output",
    attention_norm="layers.{i}.attention_norm",
    ffn_norm="layers.{i}.ffn_norm",
    qkv=("layers.{i}.attention.wq", "layers.{i}.attention.wk", "layers.{i}.attention.wv"),
    o="layers.{i}.attention.wo",
    w1="layers.{i}.feed_forward.w1",
    w3="layers.{i}.feed_forward.w3",
    w2="layers.{i}.feed_forward.w2",
)


def _refuse_alibi(config: CheckpointConfig) -> str:
    return (
        "Baichuan's 40-head 13B models use ALiBi, which is not supported; convert the 7B model" if config.num_heads == 40 else ""
    )


META_LLAMA = Architecture("Meta's Llama", _META_NAMES, read_meta, interleaved_rotary=True)

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("LlamaForCausalLM", _LLAMA_NAMES),
        Architecture("MistralForCausalLM", _LLAMA_NAMES, partial(read_huggingface, default_sliding_window=4096)),
        Architecture("InternLMForCausalLM", _LLAMA_NAMES),
        Architecture("InternLM2ForCausalLM", _INTERNLM2_NAMES, packing="grouped"),
        Architecture(
            "QWenLMHeadModel",
            _QWEN_NAMES,
            read_qwen,
            packing="stacked",
            qkv_bias="required",
            o_bias="zeros",
            bf16_always=True,
            token_ids=(0, 151643),
        ),
        Architecture("Qwen2ForCausalLM", _LLAMA_NAMES, qkv_bias="required", o_bias="zeros", token_ids=(151643, 151645)),
        Architecture("Qwen3ForCausalLM", _LLAMA_NAMES, qk_norm=True),
        Architecture("BaiChuanForCausalLM", _BAICHUAN_NAMES, packing="stacked"),
        Architecture("BaichuanForCausalLM", _BAICHUAN_NAMES, packing="stacked", normalized_head=True, refuse=_refuse_alibi),
    )
}


def find_architecture(file: ConfigFile) -> Architecture:
    """The row of config.json's `architectures[0]`, else of its auto_map, as LMDeploy looks it up. Raises CheckpointError."""
    path: Path = file.path
    listed = file.values.get("architectures") or []
    name = listed[0] if isinstance(listed, list) and listed else None
    if name is None:
        auto_map = file.values.get("auto_map") or {}
        target = auto_map.get("AutoModelForCausalLM", "") if isinstance(auto_map, dict) else ""
        name = str(target).split(".")[-1] or None
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{path}: architectures: expected one of {', '.join(ARCHITECTURES)}; found {name!r}")
    return ARCHITECTURES[name]
