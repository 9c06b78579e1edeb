"""Reads a workspace's tensors into the device's layout.

    files (contract/layout.py) --mmap--> joined over ranks --un-permuted rotary, gate and up side by side--> ModelWeights

Every file's size is checked against the layout (and the manifest, where there is one) before anything is read; a missing file or
a wrong size is refused by name. Hashes are `turbotriton convert --verify`'s business. At most one layer is held twice.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from turbotriton.backend.model.decoder import ModelWeights
from turbotriton.backend.model.layers import LayerWeights
from turbotriton.backend.ops.operands import DenseWeight, NormWeight, QkvWeights
from turbotriton.contract.errors import WorkspaceError
from turbotriton.contract.ini import ModelConfig
from turbotriton.contract.layout import MANIFEST_NAME, Split, TensorSpec, dense_tensor_specs

__all__ = ["find_weights_dir", "half_split_rotary", "load_weights"]

logger = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS_PLACES = ("", "model_repository/turbomind/1/weights", "triton_models/weights", "weights", "1/weights")


def find_weights_dir(path: Path) -> Path:
    """The folder with config.ini: `path` itself or its usual place in a workspace. Raises WorkspaceError."""
    for place in WEIGHTS_PLACES:
        if (path / place / "config.ini").is_file():
            return path / place
    raise WorkspaceError(
        f"{path}: holds no config.ini, nor does {WEIGHTS_PLACES[1]}; make a workspace with 'turbotriton convert'"
    )


def load_weights(config: ModelConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> ModelWeights:
    """`folder` holds config.ini's tensors; ranks are joined on `device`, values converted to `dtype`. Raises WorkspaceError."""
    reader = _Reader(config, folder)

    def load(name: str) -> torch.Tensor:
        return reader.read(name).to(device=device, dtype=dtype, copy=True)  # nothing may point into a file

    def rotary(name: str, num_heads: int) -> torch.Tensor:
        return half_split_rotary(reader.read(name).to(device), num_heads, config.head_dim, config.rope.dim).to(dtype)

    def norm(name: str) -> NormWeight:
        return NormWeight(load(name), config.norm_eps)

    embeddings = load("tok_embeddings.weight")
    head = embeddings if config.tie_word_embeddings else load("output.weight")
    layers = tuple(_load_layer(config, f"layers.{i}", load, rotary, norm) for i in range(config.num_layers))
    return ModelWeights(embeddings, layers, norm("norm.weight"), DenseWeight(head[: config.vocab_size].t()))


def _dense(weight: torch.Tensor, bias: torch.Tensor | None = None) -> DenseWeight:
    """weight: [in_features, out_features]. On a GPU it is stored by outputs: the skinny kernels read rows, and cuBLAS likes it."""
    return DenseWeight(weight.t().contiguous().t() if weight.is_cuda else weight, bias)


def _load_layer(
    config: ModelConfig,
    prefix: str,
    load: Callable[[str], torch.Tensor],
    rotary: Callable[[str, int], torch.Tensor],
    norm: Callable[[str], NormWeight],
) -> LayerWeights:
    qk_heads = config.num_heads + config.num_kv_heads
    attention, ffn = f"{prefix}.attention", f"{prefix}.feed_forward"
    qkv_bias = rotary(f"{attention}.w_qkv.{{rank}}.bias", qk_heads) if config.attn_bias else None
    output_bias = load(f"{attention}.wo.{{rank}}.bias") if config.attn_bias else None
    q_norm = k_norm = None
    if config.qk_norm:
        q_norm = NormWeight(rotary(f"{attention}.q_norm.weight", 1), config.norm_eps)
        k_norm = NormWeight(rotary(f"{attention}.k_norm.weight", 1), config.norm_eps)
    return LayerWeights(
        qkv=QkvWeights(
            norm=norm(f"{prefix}.attention_norm.weight"),
            qkv=_dense(rotary(f"{attention}.w_qkv.{{rank}}.weight", qk_heads), qkv_bias),
            q_norm=q_norm,
            k_norm=k_norm,
        ),
        output=_dense(load(f"{attention}.wo.{{rank}}.weight"), output_bias),
        ffn_norm=norm(f"{prefix}.ffn_norm.weight"),
        gate_up=_dense(torch.cat((load(f"{ffn}.w1.{{rank}}.weight"), load(f"{ffn}.w3.{{rank}}.weight")), dim=1)),
        down=_dense(load(f"{ffn}.w2.{{rank}}.weight")),
    )


def half_split_rotary(tensor: torch.Tensor, num_heads: int, head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Undoes the stored interleaving in the last axis of the first `num_heads` heads; later columns (v) stay.

    Stored column 2i + s of a head becomes column s * rotary_dim/2 + i. A copy: [..., >= num_heads * head_dim], same shape.
    """
    column = torch.arange(num_heads * head_dim, device=tensor.device).view(num_heads, head_dim)
    column[:, :rotary_dim] = column[:, :rotary_dim].reshape(num_heads, -1, 2).transpose(1, 2).reshape(num_heads, rotary_dim)
    rest = torch.arange(num_heads * head_dim, tensor.shape[-1], device=tensor.device)
    return tensor[..., torch.cat((column.flatten(), rest))]


class _Reader:
    """The checked files of one workspace; `read(name)` gives a joined tensor on the CPU, mapped where no join is needed."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        if config.weight_type == "int4":
            raise WorkspaceError(
                f"{folder}: weight_type is int4; serving int4 weights is not part of this version, convert the 16 bit checkpoint"
            )
        if not (folder / "config.ini").is_file():
            raise WorkspaceError(f"{folder}: holds no config.ini; make a workspace with 'turbotriton convert'")
        self._config = config
        self._folder = folder
        self._dtype = DTYPES[config.weight_type]
        self._tp = config.tp
        if config.tp > 1 and not (folder / f"layers.0.attention.w_qkv.{config.tp - 1}.weight").exists():
            # LMDeploy lets tensor_para_size be raised after converting: the unsliced ".0" files then stand for all ranks.
            logger.info("%s: tensor_para_size is %d and the files are unsliced; reading rank 0 alone", folder, config.tp)
            self._tp = 1
        self._specs = {spec.name: spec for spec in dense_tensor_specs(dataclasses.replace(config, tp=self._tp))}
        self._check_sizes()

    def _check_sizes(self) -> None:
        manifest = self._manifest_sizes()
        for spec in self._specs.values():
            shape = spec.rank_shape(self._tp)
            expected = int(np.prod(shape)) * self._dtype.itemsize
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
        parts = [self._map(file, spec.rank_shape(self._tp)) for file in spec.file_names(self._tp)]
        return _join(self._config, spec, parts)

    def _map(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        # mode "c": private pages, so torch gets writable memory and the file stays as it is
        raw = torch.from_numpy(np.memmap(self._folder / name, dtype=np.uint8, mode="c"))
        return raw.view(self._dtype).view(shape)


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
