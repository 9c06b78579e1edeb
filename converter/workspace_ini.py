"""The values of config.ini: what LMDeploy would write in `[llama]`, what its keys cannot say in `[turbotriton]`."""

from turbotriton.contract.chat_templates import template_session_len
from turbotriton.contract.errors import CheckpointError
from turbotriton.contract.ini import LlamaSection, TurbotritonSection, WorkspaceConfig

from .checkpoint import Checkpoint
from .options import ConvertOptions
from .raw_config import ConfigFile
from .tokenizer import TokenizerFolder

__all__ = ["workspace_config"]


def workspace_config(checkpoint: Checkpoint, tokenizer: TokenizerFolder, options: ConvertOptions) -> WorkspaceConfig:
    config, rope = checkpoint.config, checkpoint.config.rope
    start_id, end_id, end_ids = _token_ids(checkpoint, tokenizer, options)
    template_len = template_session_len(options.model_name)
    llama = LlamaSection(
        model_name=options.model_name,
        tensor_para_size=options.tp,
        head_num=config.num_heads,
        kv_head_num=config.num_kv_heads,
        vocab_size=config.vocab_size,
        num_layer=config.num_layers,
        inter_size=config.inter_size,
        norm_eps=config.norm_eps,
        attn_bias=int(checkpoint.shape.attn_bias),
        start_id=start_id,
        end_id=end_id,
        session_len=template_len + 8 if template_len else config.max_position_embeddings or 2048,
        weight_type=checkpoint.weight_type,
        rotary_embedding=config.head_dim,
        rope_theta=config.rope_theta,
        size_per_head=config.head_dim,
        group_size=checkpoint.group_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_scaling_factor=rope.factor,
        use_dynamic_ntk=int(config.use_dynamic_ntk),
        use_logn_attn=int(config.use_logn_attn),
    )
    ours = TurbotritonSection(
        hidden_size=config.hidden_size,
        float_type=checkpoint.float_type,
        end_ids=",".join(map(str, end_ids)),
        tie_word_embeddings=int(checkpoint.shape.tied_head),
        qk_norm=int(checkpoint.arch.qk_norm),
        sliding_window=config.sliding_window,
        rope_scaling_type=_stated_rope_scaling(llama, rope.type),
        original_max_position_embeddings=rope.original_max_position_embeddings,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        attention_factor=rope.attention_factor,
        yarn_truncate=int(rope.truncate),
    )
    return WorkspaceConfig(llama, ours)


def _stated_rope_scaling(llama: LlamaSection, wanted: str) -> str:
    """Empty where `[llama]` says it already, so that LMDeploy's rope keys stay the ones to edit."""
    implied = WorkspaceConfig(llama).model_config().rope.scaling_type
    return "" if implied == wanted else wanted


def _token_ids(checkpoint: Checkpoint, tokenizer: TokenizerFolder, options: ConvertOptions) -> tuple[int, int, list[int]]:
    """(start_id, end_id, every id that ends a turn). The tokenizer says the first two, as in LMDeploy; generation_config.json,
    else config.json, adds to the third."""
    generation = options.model_path / "generation_config.json"
    stated = ConfigFile(generation).token_ids("eos_token_id") if generation.is_file() else ()
    others = stated or checkpoint.config.eos_token_ids
    if checkpoint.arch.token_ids:
        start, end = checkpoint.arch.token_ids
    else:
        found_start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else checkpoint.config.bos_token_id
        found_end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(others), None)
        if found_end is None:
            raise CheckpointError(
                f"{options.model_path}: eos token: expected in tokenizer_config.json, generation_config.json or "
                "config.json, found none"
            )
        start, end = found_start if found_start is not None else 0, found_end
    return start, end, list(dict.fromkeys((end, *others, *tokenizer.stop_token_ids)))
