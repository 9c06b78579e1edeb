"""Which requests the queue takes, and what the others are told: the value, the limit and the remedy. Changes nothing.

`max_new_tokens_of` refuses what could never run, however empty the engine is. `check_queue` refuses what would have to wait behind too
much. A request id that is in use is the scheduler's to refuse: it alone knows which are.
"""

from turbotriton.contract.errors import InvalidInputError, UnavailableError
from turbotriton.contract.ini import EngineConfig, ModelConfig
from turbotriton.contract.wire import GenerateRequest

from .block_manager import BlockManager

__all__ = ["check_queue", "max_new_tokens_of"]


def max_new_tokens_of(source: GenerateRequest, model: ModelConfig, config: EngineConfig, blocks: BlockManager) -> int:
    """The most new tokens that the request may get. Raises InvalidInputError when it can never run."""
    num_prompt = len(source.prompt_ids)
    if not num_prompt:
        raise InvalidInputError("the prompt has no token; send at least one")
    if min(source.prompt_ids) < 0 or max(source.prompt_ids) >= model.vocab_size:
        outside = next(i for i in source.prompt_ids if not 0 <= i < model.vocab_size)
        raise InvalidInputError(f"prompt token id {outside} is outside the vocabulary of {model.vocab_size}")
    bad = next((i for i, _ in source.sampling.logit_bias if not 0 <= i < model.vocab_size), None)
    if bad is not None:
        raise InvalidInputError(f"logit_bias names token id {bad}, outside the vocabulary of {model.vocab_size}")
    if source.sample_index < 0:
        raise InvalidInputError(f"sample_index is {source.sample_index}; it must be 0 or more")
    room = config.session_len - num_prompt
    asked = source.sampling.max_new_tokens
    if room < 0 or (room == 0 and asked != 0):
        raise InvalidInputError(
            f"the prompt has {num_prompt} tokens and session_len is {config.session_len}: too long; "
            "shorten it or serve with a larger session_len"
        )
    max_new_tokens = room if asked is None else min(asked, room)
    needed = blocks.blocks_for(num_prompt + max(max_new_tokens - 1, 0))
    if needed > blocks.num_blocks:
        raise InvalidInputError(
            f"{num_prompt} prompt and {max_new_tokens} new tokens need {needed} KV blocks of {blocks.block_size} and there "
            f"are {blocks.num_blocks}: ask for fewer tokens or raise cache_max_entry_count"
        )
    return max_new_tokens


def check_queue(source: GenerateRequest, config: EngineConfig, num_waiting: int, num_waiting_tokens: int) -> None:
    """Raises UnavailableError when the queue is full. However long, one request may always wait."""
    if num_waiting >= config.max_queued_requests:
        raise UnavailableError(
            f"the queue is full: {num_waiting} requests wait and max_queued_requests is {config.max_queued_requests}; try later"
        )
    if num_waiting and num_waiting_tokens + len(source.prompt_ids) > config.max_queued_tokens:
        raise UnavailableError(
            f"the queue is full: {num_waiting_tokens} prompt tokens wait and max_queued_tokens is "
            f"{config.max_queued_tokens}; try later"
        )
