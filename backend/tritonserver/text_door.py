"""The text door: text, chat messages or token ids in, text out, streamed or whole.

execute: read -> submit n samples -> return at once         sender threads: ids -> text -> stop words -> response
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from turbotriton.backend.engine.client import EngineClient
from turbotriton.contract.errors import DeadlineExceededError, InvalidInputError, RequestCancelledError
from turbotriton.contract.wire import FinishReason, GenerateRequest, TokenDelta, TokenLogprobs
from turbotriton.text.chat_template import ChatTemplate
from turbotriton.text.detokenizer import IncrementalDetokenizer, TextTokenizer
from turbotriton.text.stop_words import StopWords

from .connection import EngineConnection
from .door import DecoupledDoor, final_error
from .inputs import check_parameters, read_bool
from .metrics import MetricsPublisher
from .responder import Mailbox, Responder
from .text_request import TextRequest, given_format, read_text_request

__all__ = ["TritonPythonModel"]

logger = logging.getLogger(__name__)

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class _Sample:
    """Text of one sample as it grows. `finish` is set when it has ended."""

    def __init__(self, request: TextRequest, tokenizer: TextTokenizer) -> None:
        context = request.prompt_ids if request.prompt_text else ()
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=request.skip_special_tokens, prompt_ids=context)
        self._stop_words = StopWords(request.stop_words, include=request.include_stop_words)
        self._hides_stop_token = request.skip_special_tokens
        self.finish: str | None = None
        self.num_tokens = 0
        self.cumulative_logprob = 0.0

    def take(self, delta: TokenDelta) -> str:
        """The text that this delta adds."""
        self.num_tokens += len(delta.token_ids)
        self.cumulative_logprob += sum(entry.token_logprob for entry in delta.logprobs)
        shown = delta.token_ids[:-1] if delta.stop_token_matched and self._hides_stop_token else delta.token_ids
        text, matched = self._stop_words.push(self._detokenizer.push(shown))
        if delta.finish_reason is not None and matched is None:
            last, matched = self._stop_words.push(self._detokenizer.flush())
            text += last if matched is not None else last + self._stop_words.flush()
            self.finish = delta.finish_reason.value
        if matched is not None:
            self.finish = FinishReason.STOP.value
        return text


class _TextAnswer:
    """Responses of one request: deltas while they come, or all at the end."""

    def __init__(self, request: TextRequest, tokenizer: TextTokenizer, ids: Sequence[int], client: EngineClient) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._client = client
        self._samples = {request_id: _Sample(request, tokenizer) for request_id in ids}
        self._texts = dict.fromkeys(self._samples, "")
        self._ids: dict[int, list[int]] = {request_id: [] for request_id in self._samples}
        self._logprobs: dict[int, list[dict[str, Any]]] = {request_id: [] for request_id in self._samples}
        self._prompt_logprobs: Sequence[TokenLogprobs] = ()
        self._owes_prompt_logprobs = "prompt_logprobs" in request.returns
        self._sent_prompt = request.exclude_input
        self._interval = 1  # new tokens that the next response waits for

    def take(self, deltas: Sequence[TokenDelta]) -> tuple[list[Any], bool]:
        for delta in self._joined(deltas):
            self._take(delta)
        is_over = all(sample.finish is not None for sample in self._samples.values())
        num_new = sum(map(len, self._ids.values()))
        if not is_over and not (self._request.stream and num_new >= self._interval):
            return [], False
        self._interval = self._request.stream_interval
        return [self._response(is_over)], is_over

    def _joined(self, deltas: Sequence[TokenDelta]) -> Sequence[TokenDelta]:
        """Deltas that bring only tokens of the only sample, as one: their text is then made at once. Stop words need each border."""
        plain = list(itertools.takewhile(_is_plain, deltas))
        if len(plain) < 2 or len(self._samples) > 1 or self._request.stop_words:
            return deltas
        token_ids = tuple(itertools.chain.from_iterable(delta.token_ids for delta in plain))
        return [TokenDelta(plain[0].request_id, token_ids), *deltas[len(plain) :]]

    def _take(self, delta: TokenDelta) -> None:
        sample = self._samples[delta.request_id]
        if sample.finish is not None:
            return  # tokens that came after a stop word
        if delta.error is not None:
            raise final_error(delta)
        if delta.finish_reason is FinishReason.CANCELLED:
            raise RequestCancelledError("the request was cancelled")
        if delta.finish_reason is FinishReason.DEADLINE and not self._request.stream:
            raise DeadlineExceededError(f"deadline_ms of {self._request.deadline_ms} passed before the answer was complete")
        self._texts[delta.request_id] += sample.take(delta)
        self._ids[delta.request_id] += delta.token_ids
        self._prompt_logprobs = delta.prompt_logprobs or self._prompt_logprobs
        for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=False):
            self._logprobs[delta.request_id].append(self._logprob(token_id, entry))
        if sample.finish is not None and delta.finish_reason is None:
            self._client.cancel(delta.request_id)  # a stop word: the engine does not know

    def _logprob(self, token_id: int, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(top_id, value) for top_id, value in entry.top]
        return self._token(token_id, entry.token_logprob) | ({"top_logprobs": top} if top else {})

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return {"token_id": token_id, "token": text, "logprob": logprob}

    def _response(self, is_over: bool) -> Any:
        request = self._request
        prompt = "" if self._sent_prompt else request.prompt_text
        self._sent_prompt = True
        samples = list(self._samples.values())
        outputs = [
            _strings("text_output", [prompt + text for text in self._texts.values()]),
            pb_utils.Tensor("output_ids", np.array([i for ids in self._ids.values() for i in ids], dtype=np.int32)),
        ]
        if "finish_reason" in request.returns:
            outputs.append(_strings("finish_reason", [sample.finish or "" for sample in samples]))
        if "num_input_tokens" in request.returns:
            outputs.append(pb_utils.Tensor("num_input_tokens", np.array([len(request.prompt_ids)], dtype=np.uint32)))
        if "num_output_tokens" in request.returns:
            counts = np.array([sample.num_tokens for sample in samples], dtype=np.uint32)
            outputs.append(pb_utils.Tensor("num_output_tokens", counts))
        if "logprobs" in request.returns:
            texts = [json.dumps(entries, ensure_ascii=False) for entries in self._logprobs.values()]
            outputs.append(_strings("logprobs", texts))
        if self._owes_prompt_logprobs and len(self._prompt_logprobs) == len(request.prompt_ids) - 1:
            self._owes_prompt_logprobs = False
            first = self._token(request.prompt_ids[0], None)
            later = [self._logprob(*pair) for pair in zip(request.prompt_ids[1:], self._prompt_logprobs, strict=True)]
            outputs.append(_strings("prompt_logprobs", [json.dumps([first, *later], ensure_ascii=False)]))
        if "cumulative_logprob" in request.returns and is_over:
            values = np.array([sample.cumulative_logprob for sample in samples], dtype=np.float32)
            outputs.append(pb_utils.Tensor("cumulative_logprob", values))
        self._texts = dict.fromkeys(self._samples, "")
        self._ids = {request_id: [] for request_id in self._samples}
        self._logprobs = {request_id: [] for request_id in self._samples}
        return pb_utils.InferenceResponse(output_tensors=outputs)


def _is_plain(delta: TokenDelta) -> bool:
    return delta.finish_reason is None and delta.error is None and not delta.logprobs and not delta.prompt_logprobs


def _strings(name: str, values: Sequence[str]) -> Any:
    return pb_utils.Tensor(name, np.array([value.encode() for value in values], dtype=np.object_))


class TritonPythonModel(DecoupledDoor):
    """Every request is decoupled: serve returns before the answer."""

    needs = ("tokenizer", "weights")

    def open(self, folder: Path, args: dict[str, str], server_pid: int) -> None:
        self._tokenizer = TextTokenizer.load(folder / "tokenizer")
        source = self._tokenizer.chat_template
        tokenizer = self._tokenizer
        self._template = None if source is None else ChatTemplate(source, tokenizer.bos_token, tokenizer.eos_token)
        self._format = given_format(self._tokenizer, folder / "weights")
        self._connection = EngineConnection(folder / "weights", server_pid)
        self._connection.connect()
        self._responder = Responder()
        is_first = args["model_instance_name"].rsplit("_", 1)[-1] == "0"
        self._metrics = MetricsPublisher(self._connection, args["model_name"]) if is_first else None

    def is_ready(self) -> bool:
        """Asked by servers that know this hook (26.03 and newer)."""
        return self._is_filled and self._connection.is_up

    def start(self, request: Any, sender: Any) -> None:
        name = request.request_id()
        if read_bool(request, "stop"):
            check_parameters(request)
            if not name:
                raise InvalidInputError("stop needs the id of the request that it stops: send it as the request's id")
            self._connection.client().cancel_named(name)
            stopped = [_strings("text_output", [""]), _strings("finish_reason", ["stopped"])]
            sender.send(pb_utils.InferenceResponse(output_tensors=stopped), flags=FINAL)
            return
        parsed = read_text_request(request, self._tokenizer, self._template, self._format)
        client = self._connection.client()
        ids = [client.next_request_id() for _ in range(parsed.num_samples)]
        mailbox = Mailbox(sender, _TextAnswer(parsed, self._tokenizer, ids, client), client, ids)
        self._responder.open(mailbox)
        others = dataclasses.replace(parsed.sampling, prompt_logprobs=None)  # samples have one prompt
        for index, request_id in enumerate(ids):
            source = GenerateRequest(
                request_id=request_id,
                prompt_ids=parsed.prompt_ids,
                sampling=others if index else parsed.sampling,
                sample_index=index,
                priority=parsed.priority,
                deadline_ms=parsed.deadline_ms,
                name=name,
            )
            self._responder.submit(mailbox, source)

    def close(self) -> None:
        """Open requests are cancelled; the engine leaves when its last door has."""
        if self._metrics is not None:
            self._metrics.close()
        self._connection.close()
        self._responder.close()
