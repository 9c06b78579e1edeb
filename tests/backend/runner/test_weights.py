"""Loading a workspace's tensors: joins ranks, undoes the rotary interleaving, refuses broken files by name."""

import json

import pytest
import torch
from tests.backend.workspace import hf_workspace_config, interleave, write_workspace
from tests.checkpoints import make_tensors
from transformers import LlamaConfig

from turbotriton.backend.runner.weights import find_weights_dir, half_split_rotary, load_weights
from turbotriton.contract.errors import WorkspaceError

CPU = torch.device("cpu")
HF = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_hidden_layers=2,
    intermediate_size=24,
    vocab_size=301,
    attention_bias=True,
)


@pytest.fixture(scope="module")
def tensors():
    return make_tensors(HF.to_dict(), seed=5)


def load(folder, config, dtype=torch.float32):
    return load_weights(config.model_config(), folder, CPU, dtype)


def assert_same(found, wanted):
    assert torch.equal(found.embeddings[:301], wanted.embeddings[:301])
    assert torch.equal(found.head.weight, wanted.head.weight)
    for a, b in zip(found.layers, wanted.layers, strict=True):
        for name in ("output", "gate_up", "down"):
            assert torch.equal(getattr(a, name).weight, getattr(b, name).weight), name
        assert torch.equal(a.qkv.qkv.weight, b.qkv.qkv.weight)
        assert torch.equal(a.qkv.qkv.bias, b.qkv.qkv.bias)
        assert torch.equal(a.output.bias, b.output.bias)


def test_weights_come_back_in_hugging_faces_order(tensors, tmp_path):
    config = hf_workspace_config(HF, attn_bias=1)
    weights = load(write_workspace(tmp_path, config, tensors), config)
    p = "model.layers.1.self_attn"
    qkv = torch.cat([tensors[f"{p}.{n}_proj.weight"].t() for n in "qkv"], dim=1)
    assert torch.equal(weights.layers[1].qkv.qkv.weight, qkv)
    assert torch.equal(weights.layers[1].qkv.qkv.bias, torch.cat([tensors[f"{p}.{n}_proj.bias"] for n in "qkv"]))
    assert weights.head.weight.shape == (32, 301)


@pytest.mark.parametrize("tp", [2, 4])
def test_rank_files_join_to_the_single_rank_weights(tensors, tmp_path, tp):
    one, many = hf_workspace_config(HF, attn_bias=1), hf_workspace_config(HF, attn_bias=1, tp=tp)
    wanted = load(write_workspace(tmp_path / "one", one, tensors), one)
    assert_same(load(write_workspace(tmp_path / "many", many, tensors), many), wanted)


def test_unsliced_files_load_under_a_larger_tensor_para_size(tensors, tmp_path):
    one, raised = hf_workspace_config(HF, attn_bias=1), hf_workspace_config(HF, attn_bias=1, tp=2)
    folder = write_workspace(tmp_path, one, tensors)
    assert_same(load(folder, raised), load(folder, one))


@pytest.mark.parametrize("weight_type", ["fp16", "bf16"])
def test_16_bit_files_widen_exactly(tensors, tmp_path, weight_type):
    config = hf_workspace_config(HF, attn_bias=1, weight_type=weight_type)
    weights = load(write_workspace(tmp_path, config, tensors), config)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[weight_type]
    assert torch.equal(weights.layers[0].down.weight, tensors["model.layers.0.mlp.down_proj.weight"].t().to(half).float())


def test_partial_rotary_leaves_the_rest_of_a_head():
    columns = torch.arange(2 * 3 * 10).view(2, 30)  # two heads of q or k and one of v, head_dim 10, rotary 6
    stored = torch.cat((interleave(columns[:, :20], 10, 6), columns[:, 20:]), dim=1)
    assert stored[0, :10].tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 8, 9]
    assert torch.equal(half_split_rotary(stored, 2, 10, 6), columns)


def test_loaded_weights_do_not_point_into_the_files(tensors, tmp_path):
    config = hf_workspace_config(HF, attn_bias=1)
    folder = write_workspace(tmp_path, config, tensors)
    weights = load(folder, config)
    path = folder / "layers.0.feed_forward.w2.0.weight"
    before = weights.layers[0].down.weight.clone()
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(weights.layers[0].down.weight, before)


def broken(tmp_path, tensors, **sections):
    config = hf_workspace_config(HF, attn_bias=1, **sections)
    return config, write_workspace(tmp_path, config, tensors)


def test_a_truncated_file_is_refused_by_name(tensors, tmp_path):
    config, folder = broken(tmp_path, tensors)
    path = folder / "layers.1.feed_forward.w2.0.weight"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(WorkspaceError, match=r"layers\.1\.feed_forward\.w2\.0\.weight: has 3070 bytes, expected 3072"):
        load(folder, config)


def test_an_empty_file_is_refused_by_name(tensors, tmp_path):
    config, folder = broken(tmp_path, tensors)
    (folder / "norm.weight").write_bytes(b"")
    with pytest.raises(WorkspaceError, match=r"norm\.weight: has 0 bytes"):
        load(folder, config)


def test_a_missing_file_is_refused_by_name(tensors, tmp_path):
    config, folder = broken(tmp_path, tensors, tensor_para_size=2)
    (folder / "layers.1.attention.wo.1.bias").unlink()
    with pytest.raises(WorkspaceError, match=r"layers\.1\.attention\.wo\.1\.bias: is missing; expected 128 bytes"):
        load(folder, config)


def test_a_manifest_of_other_sizes_is_refused(tensors, tmp_path):
    config, folder = broken(tmp_path, tensors)
    (folder / "manifest.json").write_text(json.dumps({"files": {"norm.weight": {"size": 64}}}))
    with pytest.raises(WorkspaceError, match=r"norm\.weight: has 128 bytes, but manifest\.json says 64"):
        load(folder, config)


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"norm.weight": {}}}'])
def test_a_broken_manifest_is_refused(tensors, tmp_path, text):
    config, folder = broken(tmp_path, tensors)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(WorkspaceError, match=r"manifest\.json: is no manifest"):
        load(folder, config)


def test_int4_weights_without_a_group_size_are_refused(tensors, tmp_path):
    _, folder = broken(tmp_path, tensors)
    int4 = hf_workspace_config(HF, weight_type="int4", group_size=0)
    with pytest.raises(WorkspaceError, match="group_size is 0"):
        load(folder, int4)


@pytest.mark.parametrize("place", [".", "model_repository/turbomind/1/weights", "triton_models/weights"])
def test_weights_are_found_in_a_workspace(tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "config.ini").touch()
    assert find_weights_dir(tmp_path) == tmp_path / place


def test_a_folder_without_a_workspace_is_refused(tmp_path):
    with pytest.raises(WorkspaceError, match=r"holds no config\.ini"):
        find_weights_dir(tmp_path)
