"""A dense product for a norm to add up: cuBLAS multiplies parts of the inputs as a batch, in fp32.

    x [rows, K]  =  [ part 0 | part 1 | ... ]          parts[p] = x[:, part p] W[part p]
    W [K, N]                                           y = round(sum of parts), in the norm that reads it (SplitSums)

A batch of decodes gives a product of few outputs too few tiles to fill a GPU. cuBLAS then takes smaller tiles, which read x and W more
often, or splits by itself and adds up in a launch of its own. A third of an output projection's time at 160 rows (docs/perf-log.md).
"""

import torch

from turbotriton.backend.ops.operands import SplitSums

__all__ = ["split_product"]


def split_product(x: torch.Tensor, weight: torch.Tensor, num_parts: int) -> SplitSums:
    """Launch on the current device and stream.

    x: [num_rows, in_features], fp16|bf16 on a GPU, any dtype on a CPU, contiguous inside a row
    weight: [in_features, out_features], x's dtype, any strides; num_parts divides in_features
    """
    (num_rows, k), n = x.shape, weight.shape[1]
    assert k % num_parts == 0, f"{num_parts} parts of {k} inputs"
    size = k // num_parts
    rows = x.as_strided((num_parts, num_rows, size), (size * x.stride(1), x.stride(0), x.stride(1)))
    columns = weight.as_strided((num_parts, size, n), (size * weight.stride(0), weight.stride(0), weight.stride(1)))
    if x.is_cuda:
        return SplitSums(torch.bmm(rows, columns, out_dtype=torch.float32), x.dtype)
    return SplitSums(torch.bmm(rows.float(), columns.float()), x.dtype)
