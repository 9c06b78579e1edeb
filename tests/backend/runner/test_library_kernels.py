"""Before a runner serves, products of enough numbers of rows have run that hardly any makes CUDA load a kernel later."""

import dataclasses
import itertools
import time

import pytest
import torch
from tests.backend.runner.test_decode_graphs import CONFIG, MODEL, OPTIONS
from tests.backend.runner.test_weights import HF
from tests.backend.workspace import write_workspace
from tests.checkpoints import make_tensors

from turbotriton.backend.ops import triton_column
from turbotriton.backend.ops.kernels import hopper_gate_up
from turbotriton.backend.ops.operands import Added, DenseWeight
from turbotriton.backend.runner import library_kernels
from turbotriton.backend.runner.library_kernels import load_library_kernels, product_rows
from turbotriton.backend.runner.model_runner import ModelRunner
from turbotriton.backend.runner.weights import DTYPES


@pytest.mark.parametrize("most", [1, 3, 8, 100, 1024, 1025, 8192])
def test_rows_rise_to_the_most_and_leave_no_wide_gap(most):
    rows = product_rows(most)
    assert rows == sorted(set(rows))
    assert rows[-1] == most
    assert all(later - row <= (8 if later <= 1024 else 64) for row, later in itertools.pairwise(rows))


def test_every_linear_layer_meets_every_number_of_rows(folder, monkeypatch):
    runner = ModelRunner(MODEL, CONFIG.engine_config({**OPTIONS, "device": "cpu"}.get), folder)
    decoder, layer = runner._decoder, runner._decoder.weights.layers[0]
    met: dict[str, list[int]] = {"qkv": [], "output": [], "down": [], "down of the last layer": [], "gate_up": [], "head": []}
    names = {id(layer.output): "output", id(layer.down): "down"}

    def down_projection(x, weight, residual=None):
        met[names[id(weight)] + ("" if residual is not None else " of the last layer")].append(x.shape[0])
        assert residual is None or residual.shape == (x.shape[0], weight.weight.shape[1])
        return x if residual is None else Added(residual)
        assert x.shape[1] == weight.weight.shape[0]

    def norm_gate_up_silu(x, residual, norm, weight):
        assert weight is layer.gate_up
        assert norm is layer.ffn_norm
        met["gate_up"].append(x.shape[0])
        return torch.zeros(x.shape[0], layer.down.weight.shape[0]), residual

    def lm_head(x, residual, norm, weight):
        assert weight is decoder.weights.head or weight is layer.qkv.qkv
        met["head" if weight is decoder.weights.head else "qkv"].append(x.shape[0])

    replaced = dataclasses.replace(
        decoder.ops, down_projection=down_projection, norm_gate_up_silu=norm_gate_up_silu, lm_head=lm_head
    )
    monkeypatch.setattr(decoder, "ops", replaced)
    load_library_kernels(decoder, torch.device("cpu"), torch.float32, max_tokens=100, max_sampled=7)
    assert met.pop("head") == [7, 6, 5, 4, 3, 2, 1]
    assert all(rows == product_rows(100)[::-1] for rows in met.values())
    met = {name: [] for name in (*met, "head")}
    monkeypatch.setattr(library_kernels, "_is_by_library", lambda weight, x, gated=False: (x.shape[0] < 50) == gated)
    load_library_kernels(decoder, torch.device("cpu"), torch.float32, max_tokens=100, max_sampled=7)
    assert met["gate_up"] == [rows for rows in product_rows(100)[::-1] if rows < 50]  # kernels of ours have the others
    assert met["qkv"] == [rows for rows in product_rows(100)[::-1] if rows >= 50]
    assert met["output"] == met["down"] == product_rows(100)[::-1]
    met = {name: [] for name in met}
    load_library_kernels(decoder, torch.device("cpu"), torch.float32, max_tokens=100, max_sampled=7, max_captured=64)
    assert met["output"] == met["down"] == [rows for rows in product_rows(100)[::-1] if rows > 64]
    assert met["head"] == [7, 6, 5, 4, 3, 2, 1]


def test_which_layers_after_a_norm_are_the_librarys(monkeypatch):
    monkeypatch.setattr(hopper_gate_up, "is_hopper", lambda device: True)
    monkeypatch.setattr(triton_column, "shared_memory_bytes", lambda device: 227 << 10)
    weight = DenseWeight(torch.zeros(1024, 512, dtype=torch.bfloat16).t())

    def rows_by_library(weight, *, gated):
        found = (torch.zeros(rows, 512, dtype=torch.bfloat16) for rows in (48, 49, 128, 129, 255, 256, 300, 353))
        return [x.shape[0] for x in found if triton_column.is_by_library(weight, x, gated=gated)]

    assert rows_by_library(weight, gated=True) == [129, 255, 300]
    assert rows_by_library(weight, gated=False) == [49, 128, 129, 255, 256, 300, 353]
    assert len(rows_by_library(DenseWeight(weight.weight.contiguous()), gated=True)) == 8


@pytest.mark.parametrize(("max_tokens", "max_sampled"), [(20, 3), (4, 64), (300, 300)])
def test_it_runs_with_the_reference_ops(folder, max_tokens, max_sampled):
    """Also where a step may have fewer tokens than there are slots."""
    runner = ModelRunner(MODEL, CONFIG.engine_config({**OPTIONS, "device": "cpu"}.get), folder)
    load_library_kernels(runner._decoder, torch.device("cpu"), DTYPES["fp32"], max_tokens, max_sampled)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("weights"), CONFIG, make_tensors(HF.to_dict(), seed=5))


@pytest.mark.gpu
@torch.inference_mode()
def test_hardly_any_product_waits_for_the_device_afterwards():
    """While the device is busy for some milliseconds, launching a product takes the host less than one."""
    k, n = 2048, 6144
    weight = DenseWeight(torch.randn(n, k, device="cuda", dtype=torch.bfloat16).t())
    x = torch.randn(8192, k, device="cuda", dtype=torch.bfloat16)
    for num_rows in product_rows(8192):
        x[:num_rows] @ weight.weight

    def is_late(num_rows):
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        begun = time.perf_counter()
        x[:num_rows] @ weight.weight
        return time.perf_counter() - begun > 0.003

    rows = list(range(129, 8192, 37))
    late = [num_rows for num_rows in rows if is_late(num_rows)]
    assert len(late) <= len(rows) // 25, f"{len(late)} of {len(rows)} numbers of rows: {late}"
