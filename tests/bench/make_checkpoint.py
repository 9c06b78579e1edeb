"""Writes a workspace of random weights in the shape of a real model, for the benchmarks. One file a tensor, nothing is hashed.

    PYTHONPATH=src python3 tests/bench/make_checkpoint.py --shape 1.8b --out /dev/shm/1.8b [--dtype bf16|int4|...]

Norm gains are 1, matrices normal with a deviation that keeps activations and logits near 1; with --dtype int4 linear layers hold uniform
4 bit values in groups of 128 of the same deviation, as an AWQ workspace does, and the rest is fp16; with int8 or fp8 they hold the normal
values in 8 bit with a scale an output, and the rest is bf16. Made on the GPU if there is one. --layers keeps the first so many, for steps
and profiles whose layers are alike.
"""

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from turbotriton.backend.ops.packing import pack_scales_zeros
from turbotriton.contract.ini import LlamaSection, TurbotritonSection, WorkspaceConfig, write_workspace_config
from turbotriton.contract.layout import Storage, TensorSpec, tensor_specs

__all__ = ["SHAPES", "Shape", "make_checkpoint", "workspace_config"]

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int4": torch.float16,
    "int8": torch.bfloat16,
    "fp8": torch.bfloat16,
}
LARGEST = {"int8": 127.0, "fp8": 448.0}
DEVIATIONS = 5  # that the largest 8 bit value stands for
GROUP_SIZE = 128
UNIFORM_NIBBLE_DEVIATION = 4.61  # of 0..15


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inter: int
    vocab: int
    rope_theta: float


SHAPES = {
    "1.8b": Shape(2048, 24, 16, 8, 128, 8192, 92544, 1e6),  # InternLM2-1.8B
    "8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, 5e5),  # Llama 3 8B
    "tiny": Shape(128, 2, 4, 2, 32, 256, 320, 1e4),
}


def workspace_config(name: str, dtype: str, session_len: int, layers: int = 0) -> WorkspaceConfig:
    """layers: so many instead of the shape's; 0: all."""
    shape = replace(SHAPES[name], layers=layers or SHAPES[name].layers)
    llama = LlamaSection(
        model_name=name,
        tensor_para_size=1,
        head_num=shape.heads,
        kv_head_num=shape.kv_heads,
        vocab_size=shape.vocab,
        num_layer=shape.layers,
        inter_size=shape.inter,
        norm_eps=1e-5,
        attn_bias=0,
        start_id=1,
        end_id=2,
        session_len=session_len,
        weight_type=dtype,
        group_size=GROUP_SIZE if dtype == "int4" else 0,
        rotary_embedding=shape.head_dim,
        rope_theta=shape.rope_theta,
        size_per_head=shape.head_dim,
        max_position_embeddings=session_len,
    )
    float_type = "bf16" if dtype in LARGEST else TurbotritonSection.float_type
    return WorkspaceConfig(llama, TurbotritonSection(hidden_size=shape.hidden, float_type=float_type))


def make_checkpoint(
    name: str, folder: Path, dtype: str = "bf16", session_len: int = 8192, seed: int = 0, layers: int = 0
) -> None:
    """Writes config.ini and the weight files of `dense_tensor_specs` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = workspace_config(name, dtype, session_len, layers)
    write_workspace_config(folder / "config.ini", config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    for spec in tensor_specs(config.model_config()):
        values = tensor_of(spec, SHAPES[name], dtype, generator)
        stored = values.cpu().contiguous().view(torch.uint8).numpy()
        for file in spec.file_names(1):
            stored.tofile(folder / file)


def tensor_of(spec: TensorSpec, shape: Shape, dtype: str, generator: torch.Generator) -> torch.Tensor:
    device = generator.device
    if spec.storage is Storage.NIBBLES:
        return torch.randint(0, 256, (math.prod(spec.shape) // 2,), dtype=torch.uint8, device=device, generator=generator)
    if spec.storage is Storage.SCALES_ZEROS:
        scale = 1 / (UNIFORM_NIBBLE_DEVIATION * math.sqrt(GROUP_SIZE * spec.shape[0]))
        zeros = torch.randint(7, 9, spec.shape, device=device, generator=generator)
        return pack_scales_zeros(torch.full(spec.shape, scale, device=device), zeros)
    if spec.storage is Storage.SCALE:
        fan_in = {"wo": shape.heads * shape.head_dim, "w2": shape.inter}.get(spec.name.split(".")[3], shape.hidden)
        return torch.full(spec.shape, DEVIATIONS / LARGEST[dtype] / math.sqrt(fan_in), device=device)
    if spec.storage in (Storage.INT8, Storage.FP8):
        steps = torch.empty(spec.shape, device=device).normal_(generator=generator) * (LARGEST[dtype] / DEVIATIONS)
        steps = steps.clamp(-LARGEST[dtype], LARGEST[dtype])
        return steps.round().to(torch.int8) if dtype == "int8" else steps.to(torch.float8_e4m3fn)
    if len(spec.shape) == 1:
        return torch.ones(spec.shape, dtype=DTYPES[dtype], device=device)
    fan_in = spec.shape[1] if spec.name in ("output.weight", "tok_embeddings.weight") else spec.shape[0]
    values = torch.empty(spec.shape, device=device).normal_(generator=generator) / math.sqrt(fan_in)
    return values.to(DTYPES[dtype])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder, made if absent")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--session-len", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="of the shape's, 0: all (default: %(default)s)")
    args = parser.parse_args()
    begun = time.monotonic()
    make_checkpoint(args.shape, args.out, args.dtype, args.session_len, args.seed, args.layers)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 1e9:.2f} GB in {time.monotonic() - begun:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
