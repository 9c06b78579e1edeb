"""The demo model for training: a plain Llama whose state dict has Hugging Face's names.

Half-split rotary, RMSNorm, SiLU-gated feed-forward, tied output head. `forward` is the training path; `extend` is the cached
decode of the evaluation. Knows no tokenizer and no corpus.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["Cache", "DemoConfig", "DemoModel", "export_checkpoint"]


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Every size is a multiple of 128, also when two devices share it."""

    vocab_size: int = 512
    hidden_size: int = 256
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 2
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass(slots=True)
class Cache:
    """Keys and values of each layer, [num_rows, num_heads, max_len, head_dim]; `extend` writes them in place."""

    keys: list[Tensor]
    values: list[Tensor]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [num_rows, num_heads, len, head_dim]; cos, sin: broadcastable to [num_rows, num_heads, len, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, size, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [num_rows, len, hidden] -> three of [num_rows, num_heads, len, head_dim], queries and keys rotated."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def project(self, attended: Tensor) -> Tensor:
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.project(attended)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DemoModel(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float64), frequencies).float()
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        depth_scale = (2 * config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = depth_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(parameter, std=0.04 * scale)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [num_rows, len] -> logits [num_rows, len, vocab]; every row starts at position 0."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)
            x = layer.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def new_cache(self, num_rows: int, max_len: int) -> Cache:
        shape = (num_rows, self.config.num_key_value_heads, max_len, self.config.head_dim)
        like = self.model.embed_tokens.weight
        keys = [torch.zeros(shape, device=like.device, dtype=like.dtype) for _ in self.model.layers]
        return Cache(keys, [torch.zeros_like(key) for key in keys])

    def extend(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Cached forward. ids, positions: [num_rows, len] -> hidden [num_rows, len, hidden], normalised.

        A token at position p sees the cache's slots 0..p, so slots behind a row's end may hold anything.
        """
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)  # [num_rows, 1, len, head_dim / 2]
        max_len = cache.keys[0].shape[2]
        mask = (torch.arange(max_len, device=ids.device) <= positions.unsqueeze(-1)).unsqueeze(1)  # [num_rows, 1, len, max_len]
        x = self.model.embed_tokens(ids)
        for layer, keys, values in zip(self.model.layers, cache.keys, cache.values, strict=True):
            assert isinstance(layer, Layer)
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)
            slots = positions[:, None, :, None].expand_as(k)
            keys.scatter_(2, slots, k)
            values.scatter_(2, slots, v)
            x = layer.finish(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))
        out: Tensor = self.model.norm(x)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)


def export_checkpoint(config: DemoConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bf16) for transformers' LlamaForCausalLM."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "initializer_range": 0.04,
    }
    generation = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 256}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()}
    unfinished = folder / "model.safetensors.part"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)
    unfinished.replace(folder / "model.safetensors")
