"""One answer as it grows: token ids to text, stop words, counts."""

from collections.abc import Sequence
from typing import Literal

from turbotriton.contract.errors import EngineDiedError, InvalidInputError, TurbotritonError
from turbotriton.contract.wire import FinishReason, TokenDelta
from turbotriton.text.detokenizer import IncrementalDetokenizer, TextTokenizer
from turbotriton.text.stop_words import StopWords

from .options import Response

__all__ = ["Answer"]

_ERRORS: dict[str, type[TurbotritonError]] = {"INVALID_ARG": InvalidInputError, "UNAVAILABLE": EngineDiedError}


class Answer:
    """Deltas of one request in, Responses that hold what each added out. Used by one thread at a time."""

    def __init__(
        self,
        index: int,
        tokenizer: TextTokenizer,
        num_prompt_tokens: int,
        stop_words: Sequence[str],
        *,
        skip_special_tokens: bool,
        wants_logprobs: bool,
    ) -> None:
        self.index = index
        self.finish_reason: Literal["stop", "length"] | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.is_cancelled = False
        self.needs_cancel = False  # a stop word ended it and the engine does not know
        self._num_prompt_tokens = num_prompt_tokens
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop_words = StopWords(stop_words)
        self._hides_stop_token = skip_special_tokens
        self._wants_logprobs = wants_logprobs

    def take(self, deltas: Sequence[TokenDelta]) -> Response:
        """Raises what the engine refused or failed with."""
        text = ""
        token_ids: list[int] = []
        logprobs: list[dict[int, float]] = []
        for delta in deltas:
            if self.finish_reason is not None:
                break  # tokens that came after a stop word
            text += self._take(delta)
            token_ids += delta.token_ids
            logprobs += [
                dict(entry.top) | {token_id: entry.token_logprob}
                for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=False)
            ]
        self.num_tokens += len(token_ids)
        return Response(
            text=text,
            generate_token_len=self.num_tokens,
            input_token_len=self._num_prompt_tokens,
            session_id=self.index,
            finish_reason=self.finish_reason,
            token_ids=token_ids,
            logprobs=logprobs if self._wants_logprobs else None,
        )

    def _take(self, delta: TokenDelta) -> str:
        if delta.error is not None:
            raise _error(delta)
        if delta.finish_reason is FinishReason.CANCELLED:
            self.is_cancelled = True
            return self._detokenizer.flush()
        shown = delta.token_ids[:-1] if delta.stop_token_matched and self._hides_stop_token else delta.token_ids
        text, matched = self._stop_words.push(self._detokenizer.push(shown))
        if delta.finish_reason is not None:
            self.num_cached_tokens = delta.num_cached_tokens
            if matched is None:
                last, matched = self._stop_words.push(self._detokenizer.flush())
                text += last if matched is not None else last + self._stop_words.flush()
            self.finish_reason = "length" if delta.finish_reason is FinishReason.LENGTH else "stop"
        if matched is not None:
            self.needs_cancel = delta.finish_reason is None
            self.finish_reason = "stop"
        return text


def _error(delta: TokenDelta) -> TurbotritonError:
    assert delta.error is not None
    return _ERRORS.get(delta.error_status, TurbotritonError)(delta.error)
