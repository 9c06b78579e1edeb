"""Everything that loading a runner launches, over zeros: to find out which kernels there are (precompile.py)."""

import dataclasses
from pathlib import Path

import torch

from turbotriton.contract.ini import EngineConfig, ModelConfig

from .decode_graphs import batch_buckets
from .model_runner import ModelRunner, most_tokens, resolve_compute_dtype, resolve_device
from .weights import DTYPES, empty_weights

__all__ = ["run_all_steps"]


def run_all_steps(model: ModelConfig, engine: EngineConfig, weights_dir: Path) -> None:
    """With two layers and a cache of one request. `weights_dir` is only looked at."""
    model = dataclasses.replace(model, num_layers=min(2, model.num_layers))  # the first has no residual, others are alike
    num_blocks = -(-engine.session_len // engine.cache_block_seq_len)
    device = resolve_device(engine.device)
    dtype = DTYPES[resolve_compute_dtype(engine.compute_dtype, model.float_type, device)]
    with torch.inference_mode():
        weights = empty_weights(model, weights_dir, device, dtype, for_kernels=True)
    small = dataclasses.replace(engine, cache_max_entry_count=float(num_blocks))
    runner = ModelRunner(model, small, weights_dir, weights=weights, prepare=False)
    if engine.cuda_graphs:
        for num_rows in batch_buckets(engine.max_batch_size):
            runner.run_uncaptured(num_rows)
        runner.run_pieces_uncaptured(most_tokens(engine, "cuda"))
    runner.warm_up(engine)
    runner.close()
