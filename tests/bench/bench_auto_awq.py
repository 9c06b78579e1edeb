"""How long `lite auto_awq --search-scale` takes and how much GPU memory: a few layers of random weights in the shape of Llama 3 8B.

    PYTHONPATH=src python3 tests/bench/bench_auto_awq.py --layers 3

What the command does layer by layer: 128 windows of 2,048 tokens through the layer with statistics and Gram matrices, search of scales,
rounding, packing. Reading the checkpoint and writing the result are left out (16 GB and 6 GB for the whole model). Seconds of each layer,
the first with compilation, and what 32 like the last would take.
"""

import argparse
import json
import sys
import tempfile
import time
import types
from pathlib import Path

import torch

try:
    import tqdm  # noqa: F401
except ImportError:  # a GPU machine without the package's dependencies: only the progress bar needs it

    class _NoBar:
        def __init__(self, *args: object, **kwargs: object) -> None: ...
        def __enter__(self) -> "_NoBar":
            return self

        def __exit__(self, *args: object) -> None: ...
        def update(self) -> None: ...

    sys.modules["tqdm"] = types.ModuleType("tqdm")
    sys.modules["tqdm"].tqdm = _NoBar  # type: ignore[attr-defined]

from turbotriton.backend.ops.packing import pack_awq
from turbotriton.converter.archs import find_architecture
from turbotriton.converter.raw_config import ConfigFile
from turbotriton.quant.awq import AwqOptions, quantize_layer
from turbotriton.quant.calibration import Calibration
from turbotriton.quant.model import SourceModel

SHAPES = {
    "8b": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336},
    "tiny": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512},
}
VOCAB_SIZE, WHOLE_MODEL = 4096, 32


class RandomSource:
    """Tensors made when they are read, normal with 1 / sqrt(inputs), a few input channels of norms large as models have them."""

    def __init__(self, config: dict[str, int], device: str) -> None:
        self._config, self._device = config, device
        self.tensors: dict[str, object] = {}

    def read(self, name: str) -> torch.Tensor:
        hidden, inter = self._config["hidden_size"], self._config["intermediate_size"]
        kv = hidden // self._config["num_attention_heads"] * self._config["num_key_value_heads"]
        shapes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
        shapes |= {"gate_proj": (inter, hidden), "up_proj": (inter, hidden), "down_proj": (hidden, inter)}
        shapes |= {"embed_tokens": (VOCAB_SIZE, hidden)}
        kind = name.split(".")[-2]
        if kind not in shapes:
            gain = torch.ones(hidden, dtype=torch.bfloat16)
            gain[:: hidden // 8] = 20
            return gain
        shape = shapes[kind]
        tensor = (torch.randn(shape, device=self._device) / shape[1] ** 0.5).bfloat16()
        return tensor.cpu() if kind == "embed_tokens" else tensor  # as from a file; layers would take a CPU seconds to make


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=128, help="windows (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in each (default: %(default)s)")
    parser.add_argument("--clip", action="store_true", help="also search ranges, as auto_awq --clip")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    args = parser.parse_args()
    device = torch.device(args.device)
    config = SHAPES[args.shape] | {
        "num_hidden_layers": args.layers,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": args.seqlen,
    }
    values = config | {
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        file = ConfigFile(Path(folder) / "config.json")
        arch = find_architecture(file)
        model = SourceModel(Path(folder), file, arch, arch.read_config(file), RandomSource(config, args.device), False)
        seconds = measure(model, device, args)
    found: dict[str, object] = {"bench": "auto_awq", "seconds": seconds, "whole_model_s": round(seconds[-1] * WHOLE_MODEL, 1)}
    if device.type == "cuda":
        found |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "gpu": torch.cuda.get_device_name()}
    print(f"{WHOLE_MODEL} layers like the last: {found['whole_model_s']} s; peak {found.get('peak_gib', 0)} GiB")
    print(json.dumps(found))
    return 0


@torch.inference_mode()
def measure(model: SourceModel, device: torch.device, args: argparse.Namespace) -> list[float]:
    windows = torch.randint(VOCAB_SIZE, (args.samples, args.seqlen), generator=torch.Generator().manual_seed(0))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    calibration = Calibration(model, windows, device, dtype, with_grams=True, show_progress=False)
    options = AwqOptions(scale_rule="search", clip=args.clip)
    seconds, begun = [], time.perf_counter()
    for run in calibration.layers():
        forward = time.perf_counter() - begun
        matrices, lines = quantize_layer(run, options, smooth_values=False)
        words = [pack_awq(matrix.q.t().contiguous()).cpu() for matrix in matrices.values()]
        whole = time.perf_counter() - begun
        print(f"layer {run.index}: {whole:.2f} s, {forward:.2f} of it forward; {len(words)} matrices; {lines[0]}", flush=True)
        seconds.append(round(whole, 2))
        begun = time.perf_counter()
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
