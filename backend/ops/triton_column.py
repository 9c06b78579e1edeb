"""The CUDA column: REFERENCE with our kernels bound in. Importing this needs the triton package; a broken kernel raises here."""

import dataclasses
import functools

from .kernels.paged_decode_attention import paged_decode_attention
from .kernels.rms_norm import rms_norm
from .kernels.rotary_store_kv import rotary_store_kv
from .reference.attention import attention
from .reference.units import lm_head, norm_qkv_rotary_store, output_projection_norm
from .table import REFERENCE

__all__ = ["TRITON", "UNITS_WITH_REFERENCE_PARTS"]

TRITON = dataclasses.replace(
    REFERENCE,
    norm_qkv_rotary_store=functools.partial(norm_qkv_rotary_store, rms_norm=rms_norm, rotary_store_kv=rotary_store_kv),
    attention=functools.partial(attention, paged_decode_attention=paged_decode_attention),
    output_projection_norm=functools.partial(output_projection_norm, rms_norm=rms_norm),
    lm_head=functools.partial(lm_head, rms_norm=rms_norm),
)

#: Parts of units above that still run on plain torch, for the log and `check_env`.
UNITS_WITH_REFERENCE_PARTS: tuple[str, ...] = ("attention (prefill chunks)",)
