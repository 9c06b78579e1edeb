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
    """Deltas of one request in, Responses that hold what each added out. Used by one thread at a time.

    `streams` False: what comes is kept until the last delta, whose Response is the whole answer. Without stop words its text is
    then decoded once, which costs a tenth of decoding it as it grows.
    """

    def __init__(
        self,
        index: int,
        tokenizer: TextTokenizer,
        num_prompt_tokens: int,
        stop_words: Sequence[str],
        *,
        skip_special_tokens: bool,
        wants_logprobs: bool,
        streams: bool = True,
    ) -> None:
        self.index = index
        self.finish_reason: Literal["stop", "length"] | None = None
        self.num_tokens = 0
        self.is_cancelled = False
        self.needs_cancel = False  # a stop word ended it and the engine does not know
        self._tokenizer = tokenizer
        self._num_prompt_tokens = num_prompt_tokens
        self._stop_words = StopWords(stop_words)
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._skips_special_tokens = skip_special_tokens
        self._wants_logprobs = wants_logprobs
        self._streams = streams
        self._watches_text = streams or bool(stop_words)
        self._held: list[TokenDelta] = []
        self._text = ""  # this and the next two without streaming: what there is of the answer
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, float]] = []

    def take(self, deltas: Sequence[TokenDelta]) -> Response | None:
        """What the deltas add; None: nothing that is to be shown yet. Raises what the engine refused or failed with."""
        self._held += deltas
        if not self._watches_text and self._held[-1].finish_reason is None:
            return None
        deltas, self._held = self._held, []
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
        if not self._watches_text:
            shown = token_ids[:-1] if self._hides_last(deltas[-1]) else token_ids
            text = self._tokenizer.decode(shown, skip_special_tokens=self._skips_special_tokens)
        self.num_tokens += len(token_ids)
        if not self._streams:
            text, token_ids, logprobs = self._keep(text, token_ids, logprobs)
        is_over = self.finish_reason is not None or self.is_cancelled
        if not is_over and not (self._streams and (token_ids or text)):
            return None
        return Response(
            text=text,
            generate_token_len=self.num_tokens,
            input_token_len=self._num_prompt_tokens,
            session_id=self.index,
            finish_reason=self.finish_reason,
            token_ids=token_ids,
            logprobs=logprobs if self._wants_logprobs else None,
        )

    def _keep(
        self, text: str, token_ids: list[int], logprobs: list[dict[int, float]]
    ) -> tuple[str, list[int], list[dict[int, float]]]:
        """All of the answer so far."""
        self._text += text
        self._token_ids += token_ids
        self._logprobs += logprobs
        return self._text, self._token_ids, self._logprobs

    def _hides_last(self, delta: TokenDelta) -> bool:
        return delta.stop_token_matched and self._skips_special_tokens

    def _take(self, delta: TokenDelta) -> str:
        if delta.error is not None:
            raise _ERRORS.get(delta.error_status, TurbotritonError)(delta.error)
        if delta.finish_reason is FinishReason.CANCELLED:
            self.is_cancelled = True
        elif delta.finish_reason is not None:
            self.finish_reason = "length" if delta.finish_reason is FinishReason.LENGTH else "stop"
        if not self._watches_text:
            return ""
        shown = delta.token_ids[:-1] if self._hides_last(delta) else delta.token_ids
        text, matched = self._stop_words.push(self._detokenizer.push(shown))
        if delta.finish_reason is not None and matched is None:
            last, matched = self._stop_words.push(self._detokenizer.flush())
            text += last if matched is not None else last + self._stop_words.flush()
        if matched is not None:
            self.needs_cancel = delta.finish_reason is None
            self.finish_reason = "stop"
        return text
