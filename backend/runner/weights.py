"""Reads a workspace's tensors into the device's layout.

    files (contract/layout.py) --mapped, on a GPU by file_stream.py--> joined over ranks
        --un-permuted rotary, gate and up side by side--> ModelWeights
                                int4 tiles are unpacked to a byte a value on the way and packed again as the ops take them

Every file's size is checked against the layout (and the manifest, where there is one) before anything is read; a missing file or
a wrong size is refused by name. Hashes are `turbotriton convert --verify`'s business. On a GPU, what is read ahead is bounded
(file_stream.py) and at most one layer is held twice.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from turbotriton.backend.model.decoder import ModelWeights
from turbotriton.backend.model.layers import LayerWeights
from turbotriton.backend.ops.operands import (
    DenseWeight,
    Fp8Weight,
    LinearWeight,
    NormWeight,
    QkvWeights,
    W4A16Tiles,
    W4A16Weight,
    W8A8Weight,
)
from turbotriton.backend.ops.packing import (
    deinterleave_w13,
    fragment_params,
    interleave_gate_up,
    pack_fragments,
    pack_rows,
    unpack_scales_zeros,
    unpack_tiles,
)
from turbotriton.contract.errors import ConfigError, WorkspaceError
from turbotriton.contract.ini import ModelConfig
from turbotriton.contract.layout import MANIFEST_NAME, Split, Storage, TensorSpec, tensor_specs

from .file_stream import FileStream

__all__ = ["empty_weights", "find_weights_dir", "half_split_rotary", "load_weights"]

logger = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STORED_DTYPES = {
    Storage.SCALES_ZEROS: torch.int32,
    Storage.INT8: torch.int8,
    Storage.FP8: torch.uint8,  # joined and un-permuted as bytes
    Storage.SCALE: torch.float32,
}
WEIGHTS_PLACES = ("", "model_repository/turbomind/1/weights", "triton_models/weights", "weights", "1/weights")


def find_weights_dir(path: Path) -> Path:
    """The folder with config.ini: `path` itself or its usual place in a workspace. Raises WorkspaceError."""
    for place in WEIGHTS_PLACES:
        if (path / place / "config.ini").is_file():
            return path / place
    raise WorkspaceError(
        f"{path}: holds no config.ini, nor does {WEIGHTS_PLACES[1]}; make a workspace with 'turbotriton convert'"
    )


def load_weights(
    config: ModelConfig, folder: Path, device: torch.device, dtype: torch.dtype, *, for_kernels: bool = False
) -> ModelWeights:
    """`folder` holds config.ini's tensors; ranks are joined on `device`, floats converted to `dtype`. Raises WorkspaceError;
    ConfigError when the device cannot multiply what the files hold.

    for_kernels: 4 bit weights as W4A16Tiles, where dtype and shape allow, which the reference ops do not take.
    """
    if config.weight_type == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"weight_type is fp8, but {name} has no e4m3 arithmetic (compute capability 8.9); use int8 weights")
    begun = time.monotonic()
    with contextlib.closing(_Reader(config, folder, device)) as reader:
        weights = _load(config, reader, device, dtype, for_kernels)
    seconds, gigabytes = time.monotonic() - begun, reader.num_bytes / 1e9
    logger.info("%s: %.2f GB in %.2f s, %.2f GB/s", folder, gigabytes, seconds, gigabytes / seconds)
    return weights


def empty_weights(
    config: ModelConfig, folder: Path, device: torch.device, dtype: torch.dtype, *, for_kernels: bool
) -> ModelWeights:
    """Zeros in the place of `load_weights`' values: same shapes, types and strides. `folder` is only looked at."""
    return _load(config, _ZerosReader(config, folder, device), device, dtype, for_kernels)


def _load(config: ModelConfig, reader: "_Reader", device: torch.device, dtype: torch.dtype, for_kernels: bool) -> ModelWeights:
    loader = _Loader(config, reader, device, dtype, for_kernels)
    embeddings = loader.floats("tok_embeddings.weight")
    head = embeddings if config.tie_word_embeddings else loader.floats("output.weight")
    numbers = tqdm(range(config.num_layers), desc="loading", unit="layer", disable=None)
    layers = tuple(loader.layer(f"layers.{i}") for i in numbers)
    return ModelWeights(embeddings, layers, loader.norm("norm.weight"), DenseWeight(head[: config.vocab_size].t()))


def _dense(weight: torch.Tensor, bias: torch.Tensor | None = None) -> DenseWeight:
    """weight: [in_features, out_features]. On a GPU it is stored by outputs: the skinny kernels read rows, and cuBLAS likes it."""
    return DenseWeight(_by_outputs(weight), bias)


def _by_outputs(weight: torch.Tensor) -> torch.Tensor:
    """Stored so where matrix instructions read it."""
    return weight.t().contiguous().t() if weight.is_cuda else weight


class _Loader:
    """Tensors of the files as the ops take them. Nothing that it returns points into a file."""

    def __init__(
        self, config: ModelConfig, reader: "_Reader", device: torch.device, dtype: torch.dtype, for_kernels: bool
    ) -> None:
        self._config, self._reader, self._device, self._dtype = config, reader, device, dtype
        self._for_kernels = for_kernels
        self._qk_heads = config.num_heads + config.num_kv_heads

    def floats(self, name: str) -> torch.Tensor:
        values = self._reader.read(name)
        return values.to(device=self._device, dtype=self._dtype, copy=not values.is_cuda)

    def norm(self, name: str) -> NormWeight:
        return NormWeight(self.floats(name), self._config.norm_eps)

    def layer(self, prefix: str) -> LayerWeights:
        config, attention, ffn = self._config, f"{prefix}.attention", f"{prefix}.feed_forward"
        qkv_bias = output_bias = q_norm = k_norm = None
        if config.attn_bias:
            qkv_bias = self._half_split(self.floats(f"{attention}.w_qkv.{{rank}}.bias"), self._qk_heads)
            output_bias = self.floats(f"{attention}.wo.{{rank}}.bias")
        if config.qk_norm:
            q_norm = NormWeight(self._half_split(self.floats(f"{attention}.q_norm.weight"), 1), config.norm_eps)
            k_norm = NormWeight(self._half_split(self.floats(f"{attention}.k_norm.weight"), 1), config.norm_eps)
        gate_up_files = (f"{ffn}.w13",) if config.weight_type == "int4" else (f"{ffn}.w1", f"{ffn}.w3")
        return LayerWeights(
            qkv=QkvWeights(
                norm=self.norm(f"{prefix}.attention_norm.weight"),
                qkv=self._linear(f"{attention}.w_qkv", bias=qkv_bias, rotary_heads=self._qk_heads),
                q_norm=q_norm,
                k_norm=k_norm,
            ),
            output=self._linear(f"{attention}.wo", bias=output_bias),
            ffn_norm=self.norm(f"{prefix}.ffn_norm.weight"),
            gate_up=self._linear(*gate_up_files, gated=True),
            down=self._linear(f"{ffn}.w2"),
        )

    def _linear(
        self, *prefixes: str, bias: torch.Tensor | None = None, rotary_heads: int = 0, gated: bool = False
    ) -> LinearWeight:
        """One linear layer of the columns of all `prefixes`; the first `rotary_heads` heads of its columns are un-permuted.

        gated: the columns are [gate | up].
        """

        def columns(kind: str) -> torch.Tensor:
            parts = [self._reader.read(f"{prefix}.{{rank}}.{kind}").to(self._device) for prefix in prefixes]
            joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
            return self._half_split(joined, rotary_heads) if rotary_heads else joined

        if self._config.weight_type == "int4":
            nibbles, (scales, zeros) = columns("qweight"), unpack_scales_zeros(columns("scales_zeros"))
            if prefixes[0].endswith("w13"):
                nibbles, scales, zeros = (deinterleave_w13(part) for part in (nibbles, scales, zeros))
            return self._int4(nibbles, scales, zeros, bias, gated)
        if self._config.weight_type in ("int8", "fp8"):
            weight, scale = _by_outputs(columns("weight").clone()), columns("scale").clone()
            if self._config.weight_type == "int8":
                return W8A8Weight(weight, scale, bias)
            return Fp8Weight(weight.view(torch.float8_e4m3fn), scale, bias)
        weight = columns("weight")
        return _dense(weight.to(dtype=self._dtype, copy=not weight.is_cuda), bias)

    def _int4(
        self, nibbles: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor | None, gated: bool
    ) -> LinearWeight:
        (k, m), num_groups = nibbles.shape, scales.shape[0]
        if not self._for_kernels or self._dtype is torch.float32 or m % 64 or (k // num_groups) % 64:
            return W4A16Weight(pack_rows(nibbles), scales, zeros, bias)
        if gated:
            nibbles, scales, zeros = (interleave_gate_up(part) for part in (nibbles, scales, zeros))
        return W4A16Tiles(pack_fragments(nibbles), fragment_params(scales, zeros, self._dtype), bias, self._dtype, gated)

    def _half_split(self, tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
        return half_split_rotary(tensor, num_heads, self._config.head_dim, self._config.rope.dim)


def half_split_rotary(tensor: torch.Tensor, num_heads: int, head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Undoes the stored interleaving in the last axis of the first `num_heads` heads; later columns (v) stay.

    Stored column 2i + s of a head becomes column s * rotary_dim/2 + i. A copy: [..., >= num_heads * head_dim], same shape.
    """
    column = torch.arange(num_heads * head_dim, device=tensor.device).view(num_heads, head_dim)
    column[:, :rotary_dim] = column[:, :rotary_dim].reshape(num_heads, -1, 2).transpose(1, 2).reshape(num_heads, rotary_dim)
    rest = torch.arange(num_heads * head_dim, tensor.shape[-1], device=tensor.device)
    return tensor[..., torch.cat((column.flatten(), rest))]


class _Reader:
    """The checked files of one workspace; `read(name)` gives a joined tensor: on a GPU where that is the device, else mapped."""

    def __init__(self, config: ModelConfig, folder: Path, device: torch.device) -> None:
        if not (folder / "config.ini").is_file():
            raise WorkspaceError(f"{folder}: holds no config.ini; make a workspace with 'turbotriton convert'")
        self._config = config
        self._folder = folder
        self._dtypes = STORED_DTYPES | {Storage.FLOAT: DTYPES[config.float_type]}
        self._tp = config.tp
        int4 = config.weight_type == "int4"  # cannot be sliced at load: its tiles and groups belong to a rank
        if config.tp > 1 and not int4 and not (folder / f"layers.0.attention.w_qkv.{config.tp - 1}.weight").exists():
            # LMDeploy lets tensor_para_size be raised after converting: the unsliced ".0" files then stand for all ranks.
            logger.info("%s: tensor_para_size is %d and the files are unsliced; reading rank 0 alone", folder, config.tp)
            self._tp = 1
        self._specs = {spec.name: spec for spec in tensor_specs(dataclasses.replace(config, tp=self._tp))}
        self._check_sizes()
        self._stream = FileStream(self._files(), device) if device.type == "cuda" else None

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(size for _, size in self._files())

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _files(self) -> Iterator[tuple[Path, int]]:
        float_size = self._dtypes[Storage.FLOAT].itemsize
        for spec in self._specs.values():
            for name in spec.file_names(self._tp):
                yield self._folder / name, spec.rank_bytes(self._tp, float_size)

    def _check_sizes(self) -> None:
        manifest = self._manifest_sizes()
        for spec in self._specs.values():
            shape = spec.rank_shape(self._tp)
            expected = spec.rank_bytes(self._tp, self._dtypes[Storage.FLOAT].itemsize)
            for name in spec.file_names(self._tp):
                path = self._folder / name
                if not path.is_file():
                    raise WorkspaceError(
                        f"{path}: is missing; expected {expected} bytes, shape {list(shape)}; convert the model again"
                    )
                found = path.stat().st_size
                if found != expected:
                    raise WorkspaceError(
                        f"{path}: has {found} bytes, expected {expected} (shape {list(shape)} by config.ini); convert again"
                    )
                if manifest is not None and manifest.get(name, found) != found:
                    raise WorkspaceError(
                        f"{path}: has {found} bytes, but {MANIFEST_NAME} says {manifest[name]}; convert the model again"
                    )

    def _manifest_sizes(self) -> dict[str, int] | None:
        path = self._folder / MANIFEST_NAME
        if not path.exists():
            return None  # LMDeploy writes none
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["files"]
            return {name: int(entry["size"]) for name, entry in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WorkspaceError(f"{path}: is no manifest ({error!r}); convert the model again") from None

    def read(self, name: str) -> torch.Tensor:
        spec = self._specs[name]
        parts = [self._map(file, spec) for file in spec.file_names(self._tp)]
        return _join(self._config, spec, parts)

    def _map(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """One rank's values; int4 ones unpacked to a byte each."""
        shape = spec.rank_shape(self._tp)
        if self._stream is not None:
            raw = self._stream.take(self._folder / name)
        else:  # mode "c": private pages, so torch gets writable memory and the file stays as it is
            raw = torch.from_numpy(np.memmap(self._folder / name, dtype=np.uint8, mode="c"))
        if spec.storage is Storage.NIBBLES:
            return unpack_tiles(raw, *shape)
        return raw.view(self._dtypes[spec.storage]).view(shape)


class _ZerosReader(_Reader):
    """Reads nothing but config.ini's shapes."""

    def __init__(self, config: ModelConfig, folder: Path, device: torch.device) -> None:
        self._zeros_on = device
        super().__init__(config, folder, torch.device("cpu"))

    def _check_sizes(self) -> None:
        pass

    def read(self, name: str) -> torch.Tensor:
        spec = self._specs[name]
        dtype = torch.uint8 if spec.storage is Storage.NIBBLES else self._dtypes[spec.storage]
        return torch.zeros(spec.shape, dtype=dtype, device=self._zeros_on)


def _join(config: ModelConfig, spec: TensorSpec, parts: list[torch.Tensor]) -> torch.Tensor:
    """The tp = 1 tensor. A rank's qkv file is [q share | k share | v share]; all q shares come first in the joined one."""
    if len(parts) == 1 or spec.split is Split.COPY:
        return parts[0]
    if spec.split is Split.QKV_COLUMNS:
        q_share = config.num_heads * config.head_dim // len(parts)
        kv_share = config.num_kv_heads * config.head_dim // len(parts)
        shares = [torch.split(part, [q_share, kv_share, kv_share], dim=-1) for part in parts]
        return torch.cat([share[section] for section in range(3) for share in shares], dim=-1)
    return torch.cat(parts, dim=0 if spec.split is Split.ROWS else -1)
