"""Every weight file of every family, in each weight type and number of ranks, against the index formulas of weight_formulas.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.checkpoints import make_checkpoint, make_tensors
from tests.converter.conftest import LLAMA, TORCH_DTYPES, bits
from tests.converter.weight_formulas import (
    Shape,
    check_feed_forward,
    check_int4,
    check_llama_like,
    check_qkv,
    check_rows,
    check_whole,
    grouped,
    qkv_source,
    quantise,
    rotary_source,
    separate,
    stacked,
)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("weight_type", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("source_dtype", ["fp32", "bf16"])
def test_llama(convert: Any, tmp_path: Path, tp: int, weight_type: str, source_dtype: str) -> None:
    make_checkpoint(LLAMA, tmp_path / "m", seed=3, dtype=TORCH_DTYPES[source_dtype])
    ws = convert(tmp_path / "m", tp=tp, dtype=weight_type)
    tensors = make_tensors(LLAMA, 3, TORCH_DTYPES[source_dtype])
    check_llama_like(ws, tensors, Shape(64, 4, 2, 16, 96, 301, tp), 2, TORCH_DTYPES[weight_type], bias=False)
    assert len(ws.names()) == 3 + 2 + 2 * (2 + 5 * tp), "no file more than the format's"


@pytest.mark.parametrize("tp", [4, 8])
def test_llama_on_more_ranks(convert: Any, tmp_path: Path, tp: int) -> None:
    config = LLAMA | {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "attention_bias": True}
    make_checkpoint(config, tmp_path / "m", dtype=torch.float16)
    ws = convert(tmp_path / "m", tp=tp)
    check_llama_like(ws, make_tensors(config, 0, torch.float16), Shape(128, 16, 8, 8, 96, 301, tp), 2, torch.float16, bias=True)
    assert len(ws.names()) == 3 + 2 + 2 * (2 + 7 * tp)


@pytest.mark.parametrize("tp", [1, 2])
def test_llama_of_lmdeploys_own_example_sizes(convert: Any, tmp_path: Path, tp: int) -> None:
    """head_dim 128, 401 tokens: 17 weight files and their sizes at tp 1, 28 names with config.ini at tp 2."""
    config = LLAMA | {"hidden_size": 512, "intermediate_size": 768, "vocab_size": 401}
    make_checkpoint(config, tmp_path / "m", dtype=torch.float16)
    ws = convert(tmp_path / "m", tp=tp)
    check_llama_like(
        ws, make_tensors(config, 0, torch.float16), Shape(512, 4, 2, 128, 768, 401, tp), 2, torch.float16, bias=False
    )
    assert len(ws.names() - {"manifest.json"}) == {1: 18, 2: 28}[tp]
    if tp == 1:
        sizes = {"layers.0.attention.w_qkv.0.weight": 1_048_576, "layers.0.attention.wo.0.weight": 524_288}
        sizes |= {f"layers.0.feed_forward.w{n}.0.weight": 786_432 for n in (1, 2, 3)}
        sizes |= {"norm.weight": 1024, "tok_embeddings.weight": 410_624, "output.weight": 410_624}
        assert {name: (ws.weights / name).stat().st_size for name in sizes} == sizes


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("arch", ["LlamaForCausalLM", "InternLMForCausalLM"])
def test_biases(convert: Any, tmp_path: Path, tp: int, arch: str) -> None:
    config = LLAMA | {"architectures": [arch], "attention_bias": True, "bias": True, "num_key_value_heads": 4}
    make_checkpoint(config, tmp_path / "m")
    ws = convert(tmp_path / "m", tp=tp)
    check_llama_like(ws, make_tensors(config), Shape(64, 4, 4, 16, 96, 301, tp), 2, torch.float16, bias=True)
    assert ws.llama["attn_bias"] == "1"


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_qwen2_has_a_zero_output_bias(convert: Any, released: Any, tmp_path: Path, tp: int) -> None:
    config = released("qwen1.5-0.5b-chat", num_heads=4, num_kv_heads=4, vocab_size=303, tie_word_embeddings=False)
    make_checkpoint(config, tmp_path / "m", dtype=torch.bfloat16)
    ws = convert(tmp_path / "m", tp=tp)
    tensors = make_tensors(config, 0, torch.bfloat16)
    check_llama_like(ws, tensors, Shape(64, 4, 4, 16, 96, 303, tp), 2, torch.bfloat16, bias=True)


@pytest.mark.parametrize("tp", [1, 2])
def test_qwen3_norms_are_interleaved_like_the_heads_they_scale(convert: Any, released: Any, tmp_path: Path, tp: int) -> None:
    config = released("qwen3-4b", num_heads=4, num_kv_heads=2, head_dim=32, hidden_size=96)
    make_checkpoint(config, tmp_path / "m", dtype=torch.bfloat16)
    ws = convert(tmp_path / "m", tp=tp)
    tensors = make_tensors(config, 0, torch.bfloat16)
    check_llama_like(ws, tensors, Shape(96, 4, 2, 32, 96, 320, tp), 2, torch.bfloat16, bias=False)
    for name in ("q_norm", "k_norm"):
        found = ws.bits(f"layers.1.attention.{name}.weight", (32,))
        source = bits(tensors[f"model.layers.1.self_attn.{name}.weight"])
        assert [int(x) for x in found] == [int(source[rotary_source(c, 32)]) for c in range(32)]
    assert "output.weight" not in ws.names(), "the head is tied"
    assert (ws.ours["qk_norm"], ws.ours["tie_word_embeddings"], ws.ours["hidden_size"]) == ("1", "1", "96")


def test_a_tied_checkpoint_that_holds_a_head_gets_output_weight(convert: Any, tmp_path: Path) -> None:
    folder = make_checkpoint(LLAMA, tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    ws = convert(folder)
    check_whole(ws, "output.weight", make_tensors(LLAMA)["lm_head.weight"], torch.float16)
    assert ws.ours["tie_word_embeddings"] == "0"


@pytest.mark.parametrize("tp", [1, 2])
def test_internlm2_packs_by_kv_head(convert: Any, released: Any, tmp_path: Path, tp: int) -> None:
    config = released("internlm2-chat-7b", num_heads=8, num_kv_heads=2, head_dim=16)
    make_checkpoint(config, tmp_path / "m", dtype=torch.bfloat16)
    ws = convert(tmp_path / "m", tp=tp)
    tensors, s, dtype = make_tensors(config, 0, torch.bfloat16), Shape(128, 8, 2, 16, 96, 320, tp), torch.bfloat16
    check_whole(ws, "tok_embeddings.weight", tensors["model.tok_embeddings.weight"], dtype)
    check_whole(ws, "output.weight", tensors["output.weight"], dtype)
    for i in range(2):
        p = f"model.layers.{i}"
        check_whole(ws, f"layers.{i}.attention_norm.weight", tensors[f"{p}.attention_norm.weight"], dtype)
        check_whole(ws, f"layers.{i}.ffn_norm.weight", tensors[f"{p}.ffn_norm.weight"], dtype)
        check_qkv(ws, i, tensors, s, grouped(f"{p}.attention.wqkv.weight"), dtype)
        check_rows(ws, f"layers.{i}.attention.wo.{{}}.weight", tensors[f"{p}.attention.wo.weight"], tp, dtype)
        check_feed_forward(ws, i, *(tensors[f"{p}.feed_forward.w{n}.weight"] for n in (1, 3, 2)), tp, dtype)


@pytest.mark.parametrize("tp", [1, 2])
def test_qwen_swaps_its_gate_and_up_projections(convert: Any, released: Any, tmp_path: Path, tp: int) -> None:
    config = released("qwen-7b-chat", vocab_size=321)
    make_checkpoint(config, tmp_path / "m", dtype=torch.float16)
    ws = convert(tmp_path / "m", tp=tp)
    tensors, s, dtype = make_tensors(config, 0, torch.float16), Shape(64, 4, 4, 16, 96, 321, tp), torch.bfloat16
    assert ws.llama["weight_type"] == "bf16", "whatever the checkpoint's dtype"
    check_whole(ws, "tok_embeddings.weight", tensors["transformer.wte.weight"], dtype, -(-321 // tp) * tp)
    check_whole(ws, "norm.weight", tensors["transformer.ln_f.weight"], dtype)
    for i in range(2):
        p = f"transformer.h.{i}"
        check_whole(ws, f"layers.{i}.attention_norm.weight", tensors[f"{p}.ln_1.weight"], dtype)
        check_whole(ws, f"layers.{i}.ffn_norm.weight", tensors[f"{p}.ln_2.weight"], dtype)
        check_qkv(ws, i, tensors, s, stacked(f"{p}.attn.c_attn.weight"), dtype)
        check_qkv(ws, i, tensors, s, stacked(f"{p}.attn.c_attn.bias"), dtype, kind="bias")
        for rank in range(tp):
            check_whole(ws, f"layers.{i}.attention.wo.{rank}.bias", torch.zeros(64), dtype)
        check_rows(ws, f"layers.{i}.attention.wo.{{}}.weight", tensors[f"{p}.attn.c_proj.weight"], tp, dtype)
        check_feed_forward(ws, i, *(tensors[f"{p}.mlp.{n}.weight"] for n in ("w2", "w1", "c_proj")), tp, dtype)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("arch", ["BaiChuanForCausalLM", "BaichuanForCausalLM"])
def test_baichuan_and_the_normalised_head_of_its_second_version(
    convert: Any, released: Any, tmp_path: Path, tp: int, arch: str
) -> None:
    config = released("baichuan2-7b", architectures=[arch])
    make_checkpoint(config, tmp_path / "m", dtype=torch.float32)
    ws = convert(tmp_path / "m", tp=tp, dtype="fp32")
    tensors, s, dtype = make_tensors(config), Shape(64, 4, 4, 16, 96, 320, tp), torch.float32
    for i in range(2):
        p = f"model.layers.{i}"
        check_qkv(ws, i, tensors, s, stacked(f"{p}.self_attn.W_pack.weight"), dtype)
        check_rows(ws, f"layers.{i}.attention.wo.{{}}.weight", tensors[f"{p}.self_attn.o_proj.weight"], tp, dtype)
        check_feed_forward(ws, i, *(tensors[f"{p}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")), tp, dtype)
    head = ws.bits("output.weight", (320, 64)).view(np.float32)
    source = tensors["lm_head.weight"].double().numpy()
    if arch == "BaichuanForCausalLM":
        source = source / np.sqrt((source**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(head, source, rtol=3e-7)  # one rounding of the norm, one of the quotient


def test_half_precision_head_is_normalised_before_the_cast(convert: Any, released: Any, tmp_path: Path) -> None:
    """bf16 in, bf16 out: norm rounded to bf16, then the quotient, as torch.nn.functional.normalize does in bf16."""
    config = released("baichuan2-7b")
    make_checkpoint(config, tmp_path / "m", dtype=torch.bfloat16)
    head = make_tensors(config, 0, torch.bfloat16)["lm_head.weight"]
    norm = head.float().square().sum(dim=1, keepdim=True).sqrt().bfloat16()
    expected = (head.float() / norm.float()).bfloat16()
    check_whole(convert(tmp_path / "m"), "output.weight", expected, torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------- Meta


def write_meta(folder: Path, tensors: dict[str, torch.Tensor], shards: int, *, vocab_parallel: bool = False) -> Path:
    """Meta's consolidated files of a model given under Meta's names."""
    folder.mkdir()
    axis = {
        "wq": 0,
        "wk": 0,
        "wv": 0,
        "w1": 0,
        "w3": 0,
        "output": 0,
        "w2": 1,
        "wo": 1,
        "tok_embeddings": 0 if vocab_parallel else 1,
    }
    for shard in range(shards):
        part = {}
        for name, tensor in tensors.items():
            key = name.split(".")[-2]
            part[name] = tensor.chunk(shards, axis[key])[shard].clone() if key in axis else tensor.clone()
        part["rope.freqs"] = torch.ones(8)
        torch.save(part, folder / f"consolidated.{shard:02}.pth")
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 32}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def meta_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    shapes = {"tok_embeddings": (320, 64), "norm": (64,), "output": (320, 64)}
    shapes |= {"layers.0.attention_norm": (64,), "layers.0.ffn_norm": (64,)}
    shapes |= {f"layers.0.attention.{n}": (size, 64) for n, size in (("wq", 64), ("wk", 32), ("wv", 32), ("wo", 64))}
    shapes |= {"layers.0.feed_forward.w1": (96, 64), "layers.0.feed_forward.w3": (96, 64), "layers.0.feed_forward.w2": (64, 96)}
    return {f"{name}.weight": torch.randn(*shape, generator=g).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize("vocab_parallel", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("tp", [1, 2])
def test_meta_llama_keeps_its_interleaved_columns(
    convert: Any, llama: Path, tmp_path: Path, shards: int, tp: int, vocab_parallel: bool
) -> None:
    tensors = meta_tensors()
    folder = write_meta(tmp_path / "meta", tensors, shards, vocab_parallel=vocab_parallel)
    ws = convert(folder, "llama2", tp=tp, tokenizer_path=llama / "tokenizer.json")
    s, dtype = Shape(64, 4, 2, 16, 96, 320, tp), torch.float16
    assert ws.llama["weight_type"] == "fp16", "LMDeploy has no dtype to read in this format"
    check_whole(ws, "tok_embeddings.weight", tensors["tok_embeddings.weight"], dtype)
    check_whole(ws, "output.weight", tensors["output.weight"], dtype)
    check_whole(ws, "norm.weight", tensors["norm.weight"], dtype)
    check_qkv(ws, 0, tensors, s, lambda part, row, _: (f"layers.0.attention.w{part}.weight", row), dtype, rotary=False)
    check_rows(ws, "layers.0.attention.wo.{}.weight", tensors["layers.0.attention.wo.weight"], tp, dtype)
    check_feed_forward(ws, 0, *(tensors[f"layers.0.feed_forward.w{n}.weight"] for n in (1, 3, 2)), tp, dtype)
    assert (ws.llama["max_position_embeddings"], ws.llama["session_len"], ws.llama["vocab_size"]) == ("0", "4104", "320")


# -------------------------------------------------------------------------------------------------------------- int4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_awq(convert: Any, tmp_path: Path, tp: int, bias: bool) -> None:
    heads, kv_heads, d, hidden, inter = 4, 2, 128, 512, 768
    config = LLAMA | {"hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": 1, "attention_bias": bias}
    config["quantization_config"] = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
    folder = make_checkpoint(config, tmp_path / "m", dtype=torch.float16)
    dense = make_tensors(config, 0, torch.float16)
    p = "model.layers.0"
    shapes = {f"self_attn.{n}_proj": (hidden, size * d) for n, size in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inter)}
    shapes |= {"mlp.up_proj": (hidden, inter), "mlp.down_proj": (inter, hidden)}
    natural: dict[str, Any] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        del dense[f"{p}.{name}.weight"]
        tensors, *natural[name] = quantise(shape, seed)
        dense |= {f"{p}.{name}.{kind}": tensor for kind, tensor in tensors.items()}
    save_file(dense, folder / "model.safetensors")
    ws = convert(folder, tp=tp)
    assert (ws.llama["weight_type"], ws.llama["group_size"], ws.llama["attn_bias"]) == ("int4", "128", str(int(bias)))
    assert len(ws.names() - {"manifest.json"}) == 4 + 2 + (10 if bias else 8) * tp
    s = Shape(hidden, heads, kv_heads, d, inter, 301, tp)
    for rank in range(tp):
        sources = [qkv_source(c, rank, s) for c in range((heads + 2 * kv_heads) * d // tp)]

        def gathered(which: int, columns: list[tuple[str, int]] = sources) -> list[Any]:
            return [np.asarray(natural[f"self_attn.{part}_proj"][which])[:, column] for part, column in columns]

        qkv = [np.stack(gathered(which), axis=1) for which in range(3)]
        check_int4(ws, "layers.0.attention.w_qkv", rank, qkv[0], qkv[1], torch.from_numpy(qkv[2]))
        for linear, name, k in (("attention.wo", "self_attn.o_proj", hidden), ("feed_forward.w2", "mlp.down_proj", inter)):
            q, z, scales = natural[name]
            rows, groups = slice(rank * k // tp, (rank + 1) * k // tp), slice(rank * k // 128 // tp, (rank + 1) * k // 128 // tp)
            check_int4(ws, f"layers.0.{linear}", rank, q[rows], z[groups], scales[groups])
        share = range(rank * inter // tp, (rank + 1) * inter // tp)
        pairs = [(name, c) for c in share for name in ("mlp.gate_proj", "mlp.up_proj")]
        w13 = [np.stack([np.asarray(natural[name][which])[:, c] for name, c in pairs], axis=1) for which in range(3)]
        check_int4(ws, "layers.0.feed_forward.w13", rank, w13[0], w13[1], torch.from_numpy(w13[2]))
    if bias:
        check_qkv(ws, 0, dense, s, separate(p, "bias"), torch.float16, kind="bias")
    check_whole(ws, "tok_embeddings.weight", dense["model.embed_tokens.weight"], torch.float16, -(-301 // tp) * tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["internlm2-chat-7b", "qwen-7b-chat", "baichuan2-7b"])
def test_awq_of_packed_projections(convert: Any, released: Any, tmp_path: Path, name: str, tp: int) -> None:
    kv_heads = 2 if name.startswith("internlm2") else 4
    config = released(name, num_layers=1, num_kv_heads=kv_heads, head_dim=128, inter_size=512)
    folder = make_checkpoint(config, tmp_path / "m", dtype=torch.float16)
    tensors, natural = make_tensors(config, 0, torch.float16), {}
    for seed, weight in enumerate(n for n in list(tensors) if tensors[n].ndim == 2 and ".0." in n):
        columns, rows = tensors.pop(weight).shape
        prefix = weight.removesuffix("weight")
        parts, *natural[weight] = quantise((rows, columns), seed)
        tensors |= {prefix + kind: part for kind, part in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    ws = convert(folder, tp=tp, model_format="awq", group_size=128)
    find = {
        "internlm2-chat-7b": grouped("model.layers.0.attention.wqkv.weight"),
        "qwen-7b-chat": stacked("transformer.h.0.attn.c_attn.weight"),
        "baichuan2-7b": stacked("model.layers.0.self_attn.W_pack.weight"),
    }[name]
    s = Shape(512, 4, kv_heads, 128, 512, 320, tp)
    for rank in range(tp):
        sources = [find(*qkv_source(c, rank, s), s) for c in range((4 + 2 * kv_heads) * 128 // tp)]
        qkv = [np.stack([np.asarray(natural[n][which])[:, row] for n, row in sources], axis=1) for which in range(3)]
        check_int4(ws, "layers.0.attention.w_qkv", rank, qkv[0], qkv[1], torch.from_numpy(qkv[2]))
        if name.startswith("qwen"):
            check_whole(ws, f"layers.0.attention.wo.{rank}.bias", torch.zeros(512), torch.float16)
    assert ws.llama["weight_type"] == "int4"
