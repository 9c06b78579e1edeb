"""Logits of whole texts under a workspace's weights and KV format, in one prefill a window: what accuracy is measured with.

The same decoder, ops and pages as serving, without scheduler or sampling.
"""

from pathlib import Path

import torch

from turbotriton.backend.model.decoder import Decoder
from turbotriton.backend.model.prompt_batch import prompt_batch
from turbotriton.backend.ops.table import ops_for
from turbotriton.contract.errors import WorkspaceError
from turbotriton.contract.ini import EngineConfig, read_workspace_config

from .key_offsets import key_offsets
from .kv_cache import allocate_kv_cache, read_kv_scales
from .model_runner import resolve_compute_dtype, resolve_device
from .weights import DTYPES, find_weights_dir, load_weights

__all__ = ["Scorer"]

BLOCK_SIZE = 64


class Scorer:
    """`workspace`: its folder or the weights'. `quant_policy` None: config.ini's. Raises WorkspaceError, ConfigError."""

    def __init__(self, workspace: Path, window: int, *, quant_policy: int | None = None, device: str = "auto") -> None:
        folder = find_weights_dir(workspace)
        config = read_workspace_config(folder / "config.ini")
        self.model, stated = config.model_config(), config.engine_config()
        self._device = resolve_device(device)
        dtype = DTYPES[resolve_compute_dtype(stated.compute_dtype, self.model.float_type, self._device)]
        policy = stated.quant_policy if quant_policy is None else quant_policy
        self._num_blocks = -(-window // BLOCK_SIZE)
        engine = EngineConfig(
            session_len=window, quant_policy=policy, cache_block_seq_len=BLOCK_SIZE, cache_max_entry_count=self._num_blocks
        )
        with torch.inference_mode():
            self._decoder = Decoder(self.model, load_weights(self.model, folder, self._device, dtype), ops_for(self._device))
            scales = read_kv_scales(self.model, folder) if policy == 4 else None
            offsets = key_offsets(self._decoder, window, self._device, dtype) if policy == 4 and scales is None else None
            self._kv = allocate_kv_cache(self.model, engine, self._device, dtype, scales, offsets)

    @torch.inference_mode()
    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [num_tokens], int64, at most `window` -> [num_tokens, vocab_size], fp32, on the host."""
        if int(token_ids.max()) >= self.model.vocab_size:
            raise WorkspaceError(f"token id {int(token_ids.max())} is past the {self.model.vocab_size} tokens of the vocabulary")
        model = self.model
        batch = prompt_batch(model.rope, len(token_ids), BLOCK_SIZE, self._device, use_logn_attn=model.use_logn_attn)
        x, residual = self._decoder.hidden_states(token_ids.to(self._device), batch, self._kv.k, self._kv.v)
        return self._decoder.logits(x, residual).cpu()
