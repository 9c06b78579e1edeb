"""Matrix products of the numbers of rows that a launched step may have, once, before a runner serves.

cuBLAS has dozens of kernels and picks one by the rows of a product. CUDA loads a kernel when it is first launched, which waits for all
that the device still has to do: in the middle of serving a launch then takes as long as the step itself, and the step before it
(330 ms beside 8192 tokens of an 8B model on an H200: docs/perf-log.md). Which rows get which kernel is cuBLAS's secret, so there are
enough of them here to meet most.
"""

import logging
import time

import torch

from turbotriton.backend.model.decoder import Decoder
from turbotriton.backend.ops.operands import Added, LinearWeight, QuantizedRows

__all__ = ["load_library_kernels", "product_rows"]

logger = logging.getLogger(__name__)

#: Up to so many rows every eighth number, and the number three below it: whether eight divides the rows matters, too.
FEW_ROWS, SHORT_OF = 1024, 3
#: Beyond, such numbers below (up to so many rows, every so many): most counts of tokens are divided by nothing.
SPARSE = ((4096, 32), (1 << 20, 64))
DIVIDED = 128  # and every number that this divides
EVERY_SAMPLED = 256  # so many rows of the head, and each number below


def product_rows(most: int) -> list[int]:
    """Rising, without repetition; the last is `most`."""
    rows = {row for stop in range(8, FEW_ROWS + 1, 8) for row in (stop - SHORT_OF, stop)}
    begin = FEW_ROWS
    for end, step in SPARSE:
        rows |= {stop - SHORT_OF for stop in range(begin + step, min(end, most) + 1, step)}
        begin = end
    rows |= {*range(FEW_ROWS, most, DIVIDED), most}
    return sorted(row for row in rows if row <= most)


def _is_by_library(weight: LinearWeight, x: torch.Tensor, *, gated: bool = False) -> bool:
    if x.device.type != "cuda":
        return True
    from turbotriton.backend.ops.triton_column import is_by_library

    return is_by_library(weight, x, gated=gated)


def load_library_kernels(
    decoder: Decoder, device: torch.device, dtype: torch.dtype, max_tokens: int, max_sampled: int, max_captured: int = 0
) -> None:
    """Runs a layer's and the head's linear layers over zeros. max_tokens: of a step; max_sampled: rows whose logits a step needs;
    max_captured: tokens up to which layers are in graphs, whose capture has loaded their kernels."""
    begun = time.monotonic()
    ops, weights, config = decoder.ops, decoder.weights, decoder.config
    layer, hidden, heads = weights.layers[0], config.hidden_size, config.num_heads * config.head_dim
    widest = torch.zeros(max_tokens * max(hidden, heads, config.inter_size), dtype=dtype, device=device)
    stream = torch.zeros(max_tokens, hidden, dtype=dtype, device=device)

    def zeros(num_rows: int, columns: int) -> torch.Tensor:
        return widest[: num_rows * columns].view(num_rows, columns)

    launched = [num_rows for num_rows in product_rows(max_tokens) if num_rows > max_captured]
    for num_rows in reversed(launched):  # falling: a block that torch had for one holds what comes after it
        residual, x = stream[:num_rows], zeros(num_rows, hidden)
        if _is_by_library(layer.qkv.qkv, x):
            ops.lm_head(x, x, layer.qkv.norm, layer.qkv.qkv)  # its product is what comes after the norm of a layer, too
        ops.down_projection(zeros(num_rows, heads), layer.output, residual)
        activated: torch.Tensor | QuantizedRows = zeros(num_rows, config.inter_size)
        if _is_by_library(layer.gate_up, x, gated=True):  # more than half of all that is multiplied here
            activated, _ = ops.norm_gate_up_silu(x, x, layer.ffn_norm, layer.gate_up)
        if isinstance(ops.down_projection(activated, layer.down, residual), Added):
            ops.down_projection(activated, layer.down)  # of the last layer, which adds nothing
    most = min(max_sampled, max_tokens)
    for num_rows in sorted({*range(1, min(most, EVERY_SAMPLED) + 1), *product_rows(most)}, reverse=True):
        x = zeros(num_rows, hidden)
        ops.lm_head(x, x, weights.final_norm, weights.head)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    logger.info("products that make CUDA load what cuBLAS has for them: %.1f s", time.monotonic() - begun)
