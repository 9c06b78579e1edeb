"""What 4 bit keys are stored less of: a vector for each layer and kv head, found when a model is loaded.

Some models have key channels that sit far from zero in every token. They set the scale of 4 bit keys, and what tells tokens apart is
rounded away. The same vector taken off all keys of a head changes every score of a query by one number, which softmax does not see:
so any vector is exact, and the best is what the keys have in common.

    m = mean over tokens of R_p^T k_p                 R_p: rotary at position p;  k_p: the key, of random token ids at positions 0 .. n - 1
    offset = mean over p < session_len of R_p m       = m times the mean of e^(i p f), in the plane of each frequency f

Channels that turn quickly average out; those that hardly turn stay. No text and no file is needed, and the ids are always the same.
"""

import torch

from turbotriton.backend.model.decoder import Decoder
from turbotriton.backend.model.prompt_batch import prompt_batch
from turbotriton.backend.model.rope import inverse_frequencies

__all__ = ["key_offsets"]

NUM_TOKENS, BLOCK_SIZE, SEED = 512, 64, 0


def key_offsets(decoder: Decoder, session_len: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[num_layers, num_kv_heads, head_dim], fp32, on `device`; under `inference_mode`. Runs one prompt through the decoder."""
    model, rope = decoder.config, decoder.config.rope
    num_tokens = min(NUM_TOKENS, session_len)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    shape = (model.num_layers, num_blocks, model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    k_caches, v_caches = (torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
    ids = torch.randint(model.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(SEED))
    batch = prompt_batch(rope, num_tokens, BLOCK_SIZE, device, use_logn_attn=model.use_logn_attn)
    decoder.hidden_states(ids.to(device), batch, list(k_caches), list(v_caches))
    keys = k_caches.transpose(2, 3).flatten(1, 2)[:, :num_tokens].float()  # [num_layers, num_tokens, num_kv_heads, head_dim]
    frequencies = inverse_frequencies(rope, rope.theta_for(num_tokens)).to(device)
    angles = torch.arange(num_tokens, device=device)[:, None, None] * frequencies
    mean = _turned(keys, torch.polar(torch.ones_like(angles), -angles)).mean(1)
    return _turned(mean, _mean_turn(frequencies, session_len)).nan_to_num()


def _mean_turn(frequencies: torch.Tensor, length: int) -> torch.Tensor:
    """The mean of e^(i p f) over p < length, complex64: a sum of a geometric series."""
    f = frequencies.double()
    size = torch.sin(length * f / 2) / (length * torch.sin(f / 2))
    return torch.polar(torch.ones_like(f), (length - 1) * f / 2).mul(size).to(torch.complex64)


def _turned(keys: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """keys: [..., head_dim], pairs (i, i + rotary_dim / 2) times turns: [..., rotary_dim / 2], complex; the other dims stay."""
    half = turns.shape[-1]
    pairs = torch.complex(keys[..., :half], keys[..., half : 2 * half]) * turns
    return torch.cat((pairs.real, pairs.imag, keys[..., 2 * half :]), dim=-1)
