"""What may be passed as prompts, told apart: one of them or many, texts or conversations, a list or an iterator."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from turbotriton.contract.errors import InvalidInputError

__all__ = ["Message", "Prompt", "Prompts", "is_single", "iter_prompts"]

Message = Mapping[str, Any]
Prompt = str | list[Message]
Prompts = Prompt | Iterable[Prompt]


def is_single(prompts: Prompts) -> bool:
    """A text, or a list of messages: one conversation. Then one Response answers it, not a list."""
    return isinstance(prompts, str) or (isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], Mapping))


def iter_prompts(prompts: Prompts) -> Iterator[Prompt]:
    """One prompt after the other, read as they are asked for. Raises InvalidInputError naming the one that is neither."""
    if is_single(prompts):
        yield prompts  # type: ignore[misc]
        return
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidInputError(f"prompts is a {type(prompts).__name__}; give a text, a list of messages, or many of either")
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, tuple):
            raise InvalidInputError(f"prompts[{index}] is a tuple; text with images is not part of this version")
        if not isinstance(prompt, (str, list)):
            raise InvalidInputError(f"prompts[{index}] is a {type(prompt).__name__}; it must be a text or a list of messages")
        yield prompt
