"""The CUDA column: REFERENCE with our kernels bound in. Importing this needs the triton package; a broken kernel raises here."""

import dataclasses
import functools

from .kernels.paged_decode_attention import paged_decode_attention
from .kernels.paged_prefill_attention import paged_prefill_attention
from .kernels.rms_norm import rms_norm
from .kernels.rotary_store_kv import rotary_store_kv
from .kernels.silu_and_mul import silu_and_mul
from .reference.attention import attention
from .reference.units import gate_up_silu, lm_head, norm_qkv_rotary_store, output_projection_norm
from .table import REFERENCE

__all__ = ["TRITON", "UNITS_WITH_REFERENCE_PARTS"]

TRITON = dataclasses.replace(
    REFERENCE,
    norm_qkv_rotary_store=functools.partial(norm_qkv_rotary_store, rms_norm=rms_norm, rotary_store_kv=rotary_store_kv),
    attention=functools.partial(
        attention, paged_decode_attention=paged_decode_attention, paged_prefill_attention=paged_prefill_attention
    ),
    output_projection_norm=functools.partial(output_projection_norm, rms_norm=rms_norm),
    gate_up_silu=functools.partial(gate_up_silu, silu_and_mul=silu_and_mul),
    lm_head=functools.partial(lm_head, rms_norm=rms_norm),
)

#: Parts of units above that run on plain torch where a kernel is missing, for the log and `check_env`. GEMMs are cuBLAS's by choice.
UNITS_WITH_REFERENCE_PARTS: tuple[str, ...] = (
    "linear over w4a16, w8a8 and fp8 weights",
    "store and attention over quantised KV",
)
