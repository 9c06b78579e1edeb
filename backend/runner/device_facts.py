"""What torch says about itself and the devices, for `turbotriton check_env`."""

from dataclasses import dataclass

import torch

from turbotriton.backend.ops.table import REFERENCE, ops_for, reference_ops

__all__ = ["DeviceFacts", "Gpu", "device_facts"]


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: int
    free_bytes: int
    capability: str  # compute capability, "9.0"


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """reference_ops: by device type, the ops of its column that run as plain torch; a text where the column cannot be imported."""

    torch_version: str
    cuda_build: str | None  # the CUDA that torch was built for
    build: str  # torch's own lines about its compilers and libraries
    gpus: tuple[Gpu, ...]
    reference_ops: dict[str, tuple[str, ...] | str]


def device_facts() -> DeviceFacts:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return DeviceFacts(
        torch_version=torch.__version__,
        cuda_build=torch.version.cuda,
        build=torch.__config__.show().strip(),
        gpus=tuple(_gpu(index) for index in range(count)),
        reference_ops={"cpu": tuple(reference_ops(REFERENCE)), "cuda": _cuda_reference_ops()},
    )


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(properties.name, total, free, f"{properties.major}.{properties.minor}")


def _cuda_reference_ops() -> tuple[str, ...] | str:
    try:
        column = ops_for(torch.device("cuda"))
    except ImportError as error:
        return f"the kernels cannot be imported: {error}"
    return tuple(reference_ops(column))
