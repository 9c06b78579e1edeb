"""Calibration against transformers: the same windows through its model, with hooks on every linear layer and its KV cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import make_checkpoint
from tests.converter.conftest import LLAMA
from transformers import AutoModelForCausalLM, DynamicCache

from turbotriton.demo import checkpoint_path
from turbotriton.quant.calibration import Calibration
from turbotriton.quant.commands import CalibrationOptions, calibrate
from turbotriton.quant.datasets import calibration_windows, load_text, load_tokenizer
from turbotriton.quant.kv_scales import static_scales
from turbotriton.quant.model import open_model

torch.set_num_threads(1)

NUM_WINDOWS, SEQLEN = 3, 70  # past one block of 64
KINDS = {
    "max": lambda x: x.amax(0),
    "min": lambda x: x.amin(0),
    "mean": lambda x: x.mean(0),
    "absmax": lambda x: x.abs().amax(0),
    "absmean": lambda x: x.abs().mean(0),
}


class Seen:
    """All tokens' inputs and outputs of every linear layer and norm, and keys and values, as transformers computes them."""

    def __init__(self, folder: Path, windows: torch.Tensor) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.outputs: dict[str, list[torch.Tensor]] = {}
        for name, module in model.model.named_modules(prefix="model"):
            if isinstance(module, torch.nn.Linear) or name.endswith("norm"):
                module.register_forward_hook(self._hook(name))
        self.keys: list[list[torch.Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
        self.values: list[list[torch.Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
        with torch.no_grad():
            for window in windows:
                cache = DynamicCache(config=model.config)
                model.model(window[None], past_key_values=cache, use_cache=True)
                for i, layer in enumerate(cache.layers):
                    self.keys[i].append(layer.keys[0].transpose(0, 1))  # [seqlen, kv heads, head_dim]
                    self.values[i].append(layer.values[0].transpose(0, 1))

    def _hook(self, name: str) -> Any:
        def note(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            self.inputs.setdefault(name, []).append(args[0].flatten(0, -2))
            self.outputs.setdefault(name, []).append(output.flatten(0, -2))

        return note


def windows_of(folder: Path) -> torch.Tensor:
    return calibration_windows(load_tokenizer(folder), load_text("default"), NUM_WINDOWS, SEQLEN)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2e-3, atol=2e-3 * float(wanted.abs().max()) + 1e-5)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats") / "work"
    calibrate(
        CalibrationOptions(checkpoint_path(), folder, num_samples=NUM_WINDOWS, seqlen=SEQLEN, device="cpu", show_progress=False)
    )
    return folder


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen(checkpoint_path(), windows_of(checkpoint_path()))


@pytest.mark.parametrize("which", ["inputs", "outputs"])
def test_statistics_are_those_of_transformers_under_its_names(written: Path, seen: Seen, which: str) -> None:
    stats = torch.load(written / f"{which}_stats.pth", weights_only=True)
    assert set(stats) == set(KINDS)
    wanted = getattr(seen, which)
    names = {name for name in wanted if which == "outputs" or not name.endswith("norm")}
    for kind, reduce in KINDS.items():
        assert set(stats[kind]) == names
        for name in names:
            close(stats[kind][name], reduce(torch.cat(wanted[name])))


@pytest.mark.parametrize("which", ["key", "value"])
def test_keys_after_rotary_and_values_are_those_of_its_cache(written: Path, seen: Seen, which: str) -> None:
    stats = torch.load(written / f"{which}_stats.pth", weights_only=True)
    assert set(stats) == {"max", "min", "absmax"}
    for i, windows in enumerate(getattr(seen, f"{which}s")):
        for kind in stats:
            close(stats[kind][f"model.layers.{i}"], KINDS[kind](torch.cat(windows)))


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}], ids=str)
def test_grams_are_inputs_times_inputs_and_other_architectures_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "m"
    make_checkpoint({**LLAMA, **changes}, folder, seed=2, dtype=torch.float32)
    windows = torch.randint(0, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    there = Seen(folder, windows)
    calibration = Calibration(
        open_model(folder), windows, torch.device("cpu"), torch.float32, with_grams=True, show_progress=False
    )
    sites = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.up_proj", "down": "mlp.down_proj"}
    for run in calibration.layers():
        for site, name in sites.items():
            x = torch.cat(there.inputs[f"model.layers.{run.index}.{name}"])
            close(run.grams[site], x.t() @ x / len(x))


def test_static_scales_are_lmdeploys_formulas() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = {which: torch.randn(50, 2, 4, generator=generator) + 1 for which in "kv"}
    stats = [{"max": t.amax(0), "min": t.amin(0), "absmax": t.abs().amax(0)} for t in tokens.values()]
    asymmetric, symmetric = [], []
    for t in tokens.values():
        numbers = t.flatten().tolist()
        asymmetric += [(max(numbers) - min(numbers)) / 255, (max(numbers) + min(numbers)) / 2]
        symmetric.append(max(abs(n) for n in numbers) / 127)
    assert static_scales(*stats, symmetric=False) == pytest.approx(asymmetric)
    assert static_scales(*stats, symmetric=True) == pytest.approx(symmetric)
