"""Small random checkpoints in the Hugging Face layout of each family, for tests of converter, decoder and doors.

`make_checkpoint(config, folder, seed, dtype)` writes config.json, model.safetensors, generation_config.json, tokenizer.json and
tokenizer_config.json under the family's own tensor names and packings. `scaled_config` makes a small config out of a released one
and keeps its flags. `as_transformers` renames the families that transformers has no class for into Llama or Qwen2: an oracle.

Weights are drawn so that greedy output of a random model wanders over many tokens: unit-variance activations, norms near 1.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

__all__ = ["as_transformers", "make_checkpoint", "make_tensors", "make_tokenizer", "scaled_config"]

Config = Mapping[str, Any]
LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "InternLMForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def scaled_config(
    released: Config,
    *,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int = 16,
    inter_size: int = 96,
    vocab_size: int = 320,
    max_position_embeddings: int = 512,
    **changes: Any,
) -> dict[str, Any]:
    """The released config with small sizes; flags, rope and norm settings stay. Its ratio of KV heads is kept where it divides.

    `changes` are set last, as they are. Window sizes and the rope's original length shrink with max_position_embeddings.
    """
    config = dict(released)
    hidden = num_heads * head_dim
    old_heads = released.get("num_attention_heads", released.get("n_head", 1))
    if num_kv_heads is None:
        group = old_heads // (released.get("num_key_value_heads") or old_heads)
        num_kv_heads = max(1, num_heads // group)
    old_max = released.get("max_position_embeddings") or released.get("seq_length") or max_position_embeddings
    if config["architectures"][0] == "QWenLMHeadModel":
        for old in ("n_embd", "n_head", "n_layer", "n_positions", "ffn_hidden_size", "padded_vocab_size"):
            config.pop(old, None)
        config |= {"kv_channels": head_dim, "intermediate_size": 2 * inter_size, "seq_length": max_position_embeddings}
    else:
        config["intermediate_size"] = inter_size
        if "num_key_value_heads" in released:
            config["num_key_value_heads"] = num_kv_heads
        if "head_dim" in released:
            config["head_dim"] = head_dim
    config |= {
        "hidden_size": hidden,
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
    }
    if isinstance(config.get("rope_scaling"), dict):
        scaling = dict(config["rope_scaling"])
        if scaling.get("original_max_position_embeddings"):
            share = scaling["original_max_position_embeddings"] / old_max
            scaling["original_max_position_embeddings"] = max(1, int(max_position_embeddings * share))
        config["rope_scaling"] = scaling
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(name)
        if isinstance(value, list):
            config[name] = [min(v, 2) for v in value]
        elif value is not None and value >= vocab_size:
            config[name] = 1 if name == "bos_token_id" else 2
    config.update(changes)
    return config


def _sizes(config: Config) -> tuple[int, int, int, int, int, int, int]:
    """(hidden, heads, kv heads, head_dim, inter, vocab, layers)."""
    hidden = config.get("hidden_size") or config["n_embd"]
    heads = config.get("num_attention_heads") or config["n_head"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config.get("kv_channels") or hidden // heads
    layers = config.get("num_hidden_layers") or config["n_layer"]
    inter = config.get("intermediate_size") or config["ffn_hidden_size"]
    if config["architectures"][0] == "QWenLMHeadModel":
        inter //= 2
    return hidden, heads, kv_heads, head_dim, inter, config["vocab_size"], layers


def make_tensors(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors under the names and packings of config["architectures"][0]."""
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, kv_heads, head_dim, inter, vocab, layers = _sizes(config)
    arch = config["architectures"][0]
    q_size, kv_size = heads * head_dim, kv_heads * head_dim

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * gain / columns**0.5).to(dtype)

    def vector(size: int, mean: float, std: float) -> torch.Tensor:
        return (mean + std * torch.randn(size, generator=generator)).to(dtype)

    def norm(size: int = hidden) -> torch.Tensor:
        return vector(size, 1.0, 0.1)

    def layer_tensors(i: int) -> Iterator[tuple[str, torch.Tensor]]:
        if arch in LLAMA_LIKE or arch in ("BaiChuanForCausalLM", "BaichuanForCausalLM"):
            p = f"model.layers.{i}"
            yield f"{p}.input_layernorm.weight", norm()
            yield f"{p}.post_attention_layernorm.weight", norm()
            if arch in LLAMA_LIKE:
                qkv_bias = arch == "Qwen2ForCausalLM" or config.get("attention_bias") or config.get("bias")
                o_bias = arch != "Qwen2ForCausalLM" and qkv_bias
                for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                    yield f"{p}.self_attn.{name}_proj.weight", matrix(size, hidden)
                    if qkv_bias:
                        yield f"{p}.self_attn.{name}_proj.bias", vector(size, 0.0, 0.3)
                yield f"{p}.self_attn.o_proj.weight", matrix(hidden, q_size)
                if o_bias:
                    yield f"{p}.self_attn.o_proj.bias", vector(hidden, 0.0, 0.1)
                if arch == "Qwen3ForCausalLM":
                    yield f"{p}.self_attn.q_norm.weight", norm(head_dim)
                    yield f"{p}.self_attn.k_norm.weight", norm(head_dim)
            else:
                yield f"{p}.self_attn.W_pack.weight", matrix(3 * hidden, hidden)
                yield f"{p}.self_attn.o_proj.weight", matrix(hidden, hidden)
            yield f"{p}.mlp.gate_proj.weight", matrix(inter, hidden)
            yield f"{p}.mlp.up_proj.weight", matrix(inter, hidden)
            yield f"{p}.mlp.down_proj.weight", matrix(hidden, inter)
        elif arch == "InternLM2ForCausalLM":
            p = f"model.layers.{i}"
            yield f"{p}.attention_norm.weight", norm()
            yield f"{p}.ffn_norm.weight", norm()
            yield f"{p}.attention.wqkv.weight", matrix(q_size + 2 * kv_size, hidden)
            yield f"{p}.attention.wo.weight", matrix(hidden, q_size)
            yield f"{p}.feed_forward.w1.weight", matrix(inter, hidden)
            yield f"{p}.feed_forward.w3.weight", matrix(inter, hidden)
            yield f"{p}.feed_forward.w2.weight", matrix(hidden, inter)
        elif arch == "QWenLMHeadModel":
            p = f"transformer.h.{i}"
            yield f"{p}.ln_1.weight", norm()
            yield f"{p}.ln_2.weight", norm()
            yield f"{p}.attn.c_attn.weight", matrix(3 * q_size, hidden)
            yield f"{p}.attn.c_attn.bias", vector(3 * q_size, 0.0, 0.3)
            yield f"{p}.attn.c_proj.weight", matrix(hidden, q_size)
            yield f"{p}.mlp.w1.weight", matrix(inter, hidden)
            yield f"{p}.mlp.w2.weight", matrix(inter, hidden)
            yield f"{p}.mlp.c_proj.weight", matrix(hidden, inter)
        else:
            raise ValueError(f"make_checkpoint knows no architecture {arch}")

    names = {
        "InternLM2ForCausalLM": ("model.tok_embeddings.weight", "model.norm.weight", "output.weight"),
        "QWenLMHeadModel": ("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"),
    }.get(arch, ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"))
    tied = bool(config.get("tie_word_embeddings"))
    # A tied head over large embeddings only repeats the last token: keep them small beside what the layers add.
    tensors = {names[0]: matrix(vocab, hidden, gain=0.3 if tied else hidden**0.5), names[1]: norm()}
    if not tied:
        tensors[names[2]] = matrix(vocab, hidden, gain=4.0)
    for i in range(layers):
        tensors.update(layer_tensors(i))
    return tensors


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` >= 259 tokens: <unk> <s> </s>, the 256 bytes, then pairs of letters and digits."""
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    if vocab_size < len(vocab):
        raise ValueError(f"vocab_size {vocab_size} is below {len(vocab)}, what a byte-level tokenizer needs")
    letters = "etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ0123456789Ġ"
    merges = list(islice(product(letters, repeat=2), vocab_size - len(vocab)))
    for left, right in merges:
        vocab[left + right] = len(vocab)
    while len(vocab) < vocab_size:
        vocab[f"<extra_{len(vocab)}>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def make_checkpoint(
    arch_config: Config,
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    num_shards: int = 1,
) -> Path:
    """Writes a random checkpoint into `folder` (made if absent) and returns it. Two or more shards come with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = make_tensors(arch_config, seed, dtype)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for shard in range(num_shards):
            file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
            mine = {name: tensors[name] for name in names[shard::num_shards]}
            save_file(mine, folder / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(mine, file_name)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(arch_config), indent=2))
    ids = {"bos_token_id": arch_config.get("bos_token_id", 1), "eos_token_id": arch_config.get("eos_token_id", 2)}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    make_tokenizer(arch_config["vocab_size"]).save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def as_transformers(config: Config, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The same model under Llama's (Qwen v1: Qwen2's) names, packed projections split, Baichuan2's head normalised.

    InternLM (v1) is Llama with attention_bias. Families that transformers knows come back unchanged. Qwen's long-context rules
    (logn, dynamic NTK) have no counterpart there and are dropped.
    """
    arch = config["architectures"][0]
    hidden, heads, kv_heads, head_dim, inter, _, _ = _sizes(config)
    out = dict(tensors)
    new = dict(config) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    new.pop("auto_map", None)
    if arch == "InternLMForCausalLM":
        new["attention_bias"] = bool(config.get("bias"))
    elif arch in ("BaiChuanForCausalLM", "BaichuanForCausalLM"):
        for name in [n for n in out if n.endswith("W_pack.weight")]:
            for part, rows in zip("qkv", out.pop(name).chunk(3), strict=True):
                out[name.replace("W_pack", f"{part}_proj")] = rows.contiguous()
        if arch == "BaichuanForCausalLM":
            out["lm_head.weight"] = torch.nn.functional.normalize(out["lm_head.weight"])
    elif arch == "InternLM2ForCausalLM":
        out = _internlm2_as_llama(out, kv_heads, heads // kv_heads, head_dim, hidden)
    elif arch == "QWenLMHeadModel":
        out = _qwen_as_qwen2(out)
        new |= {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "intermediate_size": inter,
            "rms_norm_eps": config["layer_norm_epsilon"],
            "rope_theta": float(config.get("rotary_emb_base", 10000)),
            "num_key_value_heads": heads,
            "hidden_size": hidden,
        }
    else:
        return dict(config), out
    return new, out


def _internlm2_as_llama(
    tensors: dict[str, torch.Tensor], kv_heads: int, group: int, head_dim: int, hidden: int
) -> dict[str, torch.Tensor]:
    renames = {
        "tok_embeddings": "embed_tokens",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("attention.wqkv.weight"):
            packed = tensor.view(kv_heads, group + 2, head_dim, hidden)
            prefix = name.removesuffix("attention.wqkv.weight") + "self_attn"
            out[f"{prefix}.q_proj.weight"] = packed[:, :group].reshape(-1, hidden).contiguous()
            out[f"{prefix}.k_proj.weight"] = packed[:, group].reshape(-1, hidden).contiguous()
            out[f"{prefix}.v_proj.weight"] = packed[:, group + 1].reshape(-1, hidden).contiguous()
            continue
        for old, replacement in renames.items():
            name = name.replace(old, replacement)
        out["lm_head.weight" if name == "output.weight" else name] = tensor
    return out


def _qwen_as_qwen2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renames = {
        "transformer.wte": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "transformer.h": "model.layers",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_proj": "mlp.down_proj",
        "mlp.w2": "mlp.gate_proj",
        "mlp.w1": "mlp.up_proj",
    }
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        for old, replacement in renames.items():
            name = name.replace(old, replacement)
        if "attn.c_attn" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = rows.contiguous()
        else:
            out[name] = tensor
    return out
