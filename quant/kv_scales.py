"""Static scales of keys and values for LMDeploy v0.3's KV int8 (quant_policy 4 with files in the workspace).

Over a layer's heads of one rank:   asymmetric  scale = (max - min) / 255, zero = (max + min) / 2       4 floats: k, k, v, v
                                    symmetric   scale = absmax / 127                                     2 floats: k, v
"""

import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from turbotriton.contract.errors import ConfigError, WorkspaceError
from turbotriton.contract.ini import read_workspace_config
from turbotriton.contract.layout import kv_scale_file

__all__ = ["static_scales", "write_kv_scales"]

Stats = Mapping[str, Mapping[str, torch.Tensor]]


def static_scales(key: Mapping[str, torch.Tensor], value: Mapping[str, torch.Tensor], *, symmetric: bool) -> list[float]:
    """key, value: max, min, absmax of one layer's heads of one rank, each [heads, head_dim]."""
    numbers: list[float] = []
    for stats in (key, value):
        if symmetric:
            numbers.append(float(stats["absmax"].float().max()) / 127)
        else:
            high, low = float(stats["max"].float().max()), float(stats["min"].float().min())
            numbers += [(high - low) / 255, (high + low) / 2]
    return numbers


def write_kv_scales(work_dir: Path, weights: Path, *, symmetric: bool, num_tp: int) -> int:
    """From `calibrate`'s key_stats.pth and value_stats.pth into a workspace's weights folder; returns how many files."""
    model = read_workspace_config(weights / "config.ini").model_config()
    if num_tp != model.tp:
        raise ConfigError(f"--num-tp is {num_tp}, but the workspace was converted with --tp {model.tp}; give the same")
    key, value = (_read_stats(work_dir / f"{which}_stats.pth") for which in ("key", "value"))
    layers = list(key["max"])
    shape = (model.num_kv_heads, model.head_dim)
    if len(layers) != model.num_layers or key["max"][layers[0]].shape != shape:
        raise ConfigError(
            f"{work_dir}: has {len(layers)} layers of {list(key['max'][layers[0]].shape)}, but {weights} has {model.num_layers} "
            f"of {list(shape)}; calibrate the model that the workspace is made of"
        )
    heads = model.num_kv_heads // num_tp
    contents: dict[str, bytes] = {}
    for i, layer in enumerate(layers):
        for rank in range(num_tp):
            mine = slice(rank * heads, (rank + 1) * heads)
            k, v = ({kind: stats[kind][layer][mine] for kind in stats} for stats in (key, value))
            numbers = static_scales(k, v, symmetric=symmetric)
            contents[kv_scale_file(i, rank)] = struct.pack(f"<{len(numbers)}f", *numbers)
    for name, content in contents.items():
        (weights / name).write_bytes(content)
    return len(contents)


def _read_stats(path: Path) -> Stats:
    try:
        stats = torch.load(path, weights_only=True)
        if all(len(stats[kind]) > 0 for kind in ("max", "min", "absmax")):
            return stats  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise WorkspaceError(f"{path}: is missing; run 'turbotriton lite calibrate' with --work-dir {path.parent}") from None
    except Exception as error:  # noqa: BLE001 - torch.load raises what the pickle's bytes lead to
        raise WorkspaceError(f"{path}: is no statistics file ({type(error).__name__}); calibrate again") from None
    raise WorkspaceError(f"{path}: holds no layers; calibrate again")
