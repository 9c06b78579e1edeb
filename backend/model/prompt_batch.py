"""One whole prompt in blocks 0, 1, ...: the batch of a forward pass outside serving (scores, calibration, key offsets)."""

import torch

from turbotriton.backend.ops.operands import AttentionBatch
from turbotriton.contract.ini import RopeConfig

from .decoder import logn_scale
from .rope import attention_factor, cos_sin, inverse_frequencies

__all__ = ["prompt_batch"]


def prompt_batch(
    rope: RopeConfig, num_tokens: int, block_size: int, device: torch.device, *, use_logn_attn: bool
) -> AttentionBatch:
    """Positions 0 .. num_tokens - 1 of one row; ceil(num_tokens / block_size) blocks."""
    positions = torch.arange(num_tokens, device=device)
    inverse = inverse_frequencies(rope, rope.theta_for(num_tokens)).to(device).expand(num_tokens, -1)
    cos, sin = cos_sin(inverse, positions, attention_factor(rope))
    return AttentionBatch(
        cos=cos,
        sin=sin,
        q_scale=logn_scale(positions, rope.max_position_embeddings) if use_logn_attn else None,
        slot_mapping=positions,
        block_tables=torch.arange(-(-num_tokens // block_size), dtype=torch.int32, device=device)[None],
        context_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
        num_decodes=0,
        max_decode_context=0,
        cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        prefills=((num_tokens, num_tokens),),
    )
