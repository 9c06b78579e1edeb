"""Writes small workspaces straight from contract/layout.py, independent of the converter, from Hugging Face's tensors."""

from collections.abc import Mapping
from pathlib import Path

import torch

from turbotriton.contract.ini import LlamaSection, TurbotritonSection, WorkspaceConfig, write_workspace_config
from turbotriton.contract.layout import Split, TensorSpec, dense_tensor_specs, padded_vocab_size

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def hf_workspace_config(config, *, tp: int = 1, weight_type: str = "fp32", **sections) -> WorkspaceConfig:
    """From a transformers config; `sections` are keys of either section that override what is derived."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = dict(config.rope_parameters)
    llama = {
        "model_name": "test",
        "tensor_para_size": tp,
        "head_num": config.num_attention_heads,
        "kv_head_num": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "num_layer": config.num_hidden_layers,
        "inter_size": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "attn_bias": int(getattr(config, "attention_bias", False)),
        "start_id": 1,
        "end_id": 2,
        "session_len": 256,
        "weight_type": weight_type,
        "rotary_embedding": head_dim,
        "size_per_head": head_dim,
        "rope_theta": rope["rope_theta"],
        "max_position_embeddings": config.max_position_embeddings,
        "rope_scaling_factor": rope.get("factor", 0.0),
    }
    ours = {
        "hidden_size": config.hidden_size,
        "tie_word_embeddings": int(config.tie_word_embeddings),
        "rope_scaling_type": rope["rope_type"].replace("default", "none"),
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", 0),
        "sliding_window": getattr(config, "sliding_window", None) or 0,
        "compute_dtype": "fp32",
    }
    for key in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
        if rope.get(key) is not None:
            ours[key] = rope[key]
    for key, value in sections.items():
        (ours if key in TurbotritonSection.__dataclass_fields__ else llama)[key] = value
    return WorkspaceConfig(LlamaSection(**llama), TurbotritonSection(**ours))


def write_workspace(folder: Path, config: WorkspaceConfig, state: Mapping[str, torch.Tensor]) -> Path:
    """`state`: model.* and lm_head.* as transformers names them. Returns `folder`, then with config.ini and the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_workspace_config(folder / "config.ini", config)
    model = config.model_config()
    for spec in dense_tensor_specs(model):
        joined = _stored(spec, model, state).contiguous()
        assert tuple(joined.shape) == spec.shape, (spec.name, joined.shape, spec.shape)
        for rank, name in enumerate(spec.file_names(model.tp)):
            part = _rank_part(spec, joined, rank, model).contiguous().to(DTYPES[model.weight_type])
            part.flatten().view(torch.uint8).numpy().tofile(folder / name)
    return folder


def interleave(tensor: torch.Tensor, head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Stored order of the last axis, column by column, from the rule in layout.py."""
    index = list(range(tensor.shape[-1]))
    for head in range(tensor.shape[-1] // head_dim):
        for i in range(rotary_dim // 2):
            for s in (0, 1):
                index[head * head_dim + 2 * i + s] = head * head_dim + s * rotary_dim // 2 + i
    return tensor[..., index]


def _stored(spec: TensorSpec, model, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    name = spec.name
    if name in ("tok_embeddings.weight", "output.weight"):
        table = state["model.embed_tokens.weight" if name.startswith("tok") else "lm_head.weight"].float()
        extra = padded_vocab_size(model.vocab_size, model.tp) - table.shape[0]
        return torch.cat((table, torch.zeros(extra, table.shape[1])))
    if name == "norm.weight":
        return state["model.norm.weight"].float()
    prefix = ".".join(["model", *name.split(".")[:2]])
    kind = name.split(".", 2)[2]

    def rotary(tensor: torch.Tensor) -> torch.Tensor:
        return interleave(tensor.float(), model.head_dim, model.rope.dim)

    def projection(which: str, part: str) -> torch.Tensor:
        tensor = state[f"{prefix}.self_attn.{which}_proj.{part}"].float()
        return tensor.t() if part == "weight" else tensor

    if ".w_qkv." in name:
        part = name.rsplit(".", 1)[1]
        return torch.cat((rotary(projection("q", part)), rotary(projection("k", part)), projection("v", part)), dim=-1)
    if kind == "attention.wo.{rank}.bias":
        return state.get(f"{prefix}.self_attn.o_proj.bias", torch.zeros(model.hidden_size)).float()
    simple = {
        "attention_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "attention.wo.{rank}.weight": "self_attn.o_proj.weight",
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
        "feed_forward.w1.{rank}.weight": "mlp.gate_proj.weight",
        "feed_forward.w3.{rank}.weight": "mlp.up_proj.weight",
        "feed_forward.w2.{rank}.weight": "mlp.down_proj.weight",
    }
    tensor = state[f"{prefix}.{simple[kind]}"].float()
    if "_norm" in kind:
        return rotary(tensor) if kind.startswith("attention.") else tensor
    return tensor.t()


def _rank_part(spec: TensorSpec, joined: torch.Tensor, rank: int, model) -> torch.Tensor:
    if spec.split in (Split.NONE, Split.COPY):
        return joined
    if spec.split is Split.ROWS:
        return joined.chunk(model.tp, dim=0)[rank]
    if spec.split is Split.COLUMNS:
        return joined.chunk(model.tp, dim=-1)[rank]
    sizes = [model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.num_kv_heads * model.head_dim]
    return torch.cat([section.chunk(model.tp, dim=-1)[rank] for section in joined.split(sizes, dim=-1)], dim=-1)
