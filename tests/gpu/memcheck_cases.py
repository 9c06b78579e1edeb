"""Launches every kernel on odd shapes, for compute-sanitizer to watch. `--plant` adds a store outside its buffer to be found.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 makes each tensor an allocation of its own, so that one element too far is an error.
"""

import sys

import torch
import triton
import triton.language as tl

from turbotriton.backend.ops.kernels.paged_decode_attention import paged_decode_attention
from turbotriton.backend.ops.kernels.rms_norm import rms_norm
from turbotriton.backend.ops.kernels.rotary_store_kv import rotary_store_kv


@triton.jit
def _planted_fault_kernel(x_ptr, OFFSET: tl.constexpr):
    tl.store(x_ptr + OFFSET + tl.arange(0, 16), 1.0)


def launch_all() -> None:
    for dtype in (torch.float16, torch.bfloat16):

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device="cuda")

        for num_tokens, hidden in ((3, 72), (17, 1000), (5, 4096)):
            rms_norm(zeros(num_tokens, hidden), zeros(hidden), 1e-5, zeros(num_tokens, hidden))
        for num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim in ((7, 6, 3, 40, 24), (3, 32, 8, 128, 128)):
            qkv, angle = zeros(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), zeros(num_tokens, rotary_dim // 2).float()
            k_cache, v_cache = zeros(2, num_kv_heads, 5, head_dim), zeros(2, num_kv_heads, 5, head_dim)
            slots = torch.arange(num_tokens, device="cuda") + 10 - num_tokens
            slots[0] = -1
            rotary_store_kv(qkv, angle, angle, angle[:, 0].contiguous(), k_cache, v_cache, slots, num_heads, num_kv_heads)
        for num_heads, num_kv_heads, head_dim, block_size, window in ((6, 3, 40, 5, 0), (32, 8, 128, 64, 0), (4, 2, 80, 16, 200)):
            lens = torch.tensor([block_size * 8 * 3, 0, 1, 77], device="cuda", dtype=torch.int32).clamp(max=24 * block_size)
            k_cache, v_cache = zeros(96, num_kv_heads, block_size, head_dim), zeros(96, num_kv_heads, block_size, head_dim)
            tables = torch.randperm(96, device="cuda").view(4, 24).int()
            tables[1:, 20:] = 1 << 30  # must not be followed
            paged_decode_attention(zeros(4, num_heads, head_dim), k_cache, v_cache, tables, lens, 0.1, window)
    torch.cuda.synchronize()


if __name__ == "__main__":
    launch_all()
    if "--plant" in sys.argv:
        _planted_fault_kernel[(1,)](torch.zeros(1000, device="cuda"), OFFSET=1000)
        torch.cuda.synchronize()
    print("memcheck cases ran")
