"""A client of the OpenAI server without the `openai` package: LMDeploy's `APIClient`, and conversations for terminal and web page."""

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from turbotriton.contract.errors import (
    DeadlineExceededError,
    InvalidInputError,
    ServerError,
    TurbotritonError,
    UnavailableError,
)

from .text_door import Delta

__all__ = ["APIClient", "ChatStream", "InteractiveConversation", "client"]

CONNECT_TIMEOUT_S = 10.0
_ERRORS: dict[int, type[TurbotritonError]] = {429: UnavailableError, 503: UnavailableError, 504: DeadlineExceededError}


class APIClient:
    """The calls of LMDeploy's class of this name. A stream is a generator of dicts; a whole answer is a generator of one dict.

    certificate: of the server or of who signed it, PEM; None: one that this machine knows.
    Raises InvalidInputError (4xx), UnavailableError (429, 503, no server), ServerError. Thread-safe.
    """

    def __init__(self, api_server_url: str, api_key: str | None = None, *, certificate: Path | None = None) -> None:
        if not api_server_url.startswith(("http://", "https://")):
            raise InvalidInputError(f"address {api_server_url!r} is no http:// or https:// URL of an OpenAI server")
        self.url = api_server_url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            trust_env=not _is_local(self.url),
            verify=True if certificate is None else ssl.create_default_context(cafile=certificate),
        )
        self._models: list[str] | None = None

    @property
    def available_models(self) -> list[str]:
        """Asked once."""
        if self._models is None:
            self._models = [entry["id"] for entry in self._json("GET", "/v1/models")["data"]]
        return self._models

    @property
    def model(self) -> str:
        """The first model that the server has."""
        if not self.available_models:
            raise UnavailableError(f"{self.url} has no model ready; try later")
        return self.available_models[0]

    def encode(self, input: str | list[str], do_preprocess: bool = False, add_bos: bool = True) -> tuple[Any, Any]:
        """-> (input_ids, length); lists of them for a list."""
        found = self._json("POST", "/v1/encode", {"input": input, "do_preprocess": do_preprocess, "add_bos": add_bos})
        return found["input_ids"], found["length"]

    def chat_completions_v1(
        self, model: str, messages: str | list[dict[str, Any]], stream: bool = False, **options: Any
    ) -> Iterator[dict[str, Any]]:
        yield from self._answers("/v1/chat/completions", {"model": model, "messages": messages, "stream": stream, **options})

    def completions_v1(
        self, model: str, prompt: str | list[Any], stream: bool = False, **options: Any
    ) -> Iterator[dict[str, Any]]:
        yield from self._answers("/v1/completions", {"model": model, "prompt": prompt, "stream": stream, **options})

    def chat_interactive_v1(
        self, prompt: str | list[dict[str, Any]], stream: bool = False, **options: Any
    ) -> Iterator[dict[str, Any]]:
        yield from self._answers("/v1/chat/interactive", {"prompt": prompt, "stream": stream, **options})

    def chat(
        self, prompt: str, session_id: int, request_output_len: int = 512, stream: bool = False, **options: Any
    ) -> Iterator[tuple[str, int, str | None]]:
        """One turn of a conversation that the server keeps: (text, tokens so far, finish_reason) of each piece."""
        for reply in self.chat_interactive_v1(
            prompt, stream=stream, session_id=session_id, request_output_len=request_output_len, interactive_mode=True, **options
        ):
            yield reply["text"], reply["tokens"], reply["finish_reason"]

    def end_session(self, session_id: int) -> None:
        """The server forgets the conversation."""
        for _ in self.chat_interactive_v1("", session_id=session_id, request_output_len=0, interactive_mode=False):
            pass

    def cancel(self, session_id: int) -> None:
        """Ends the answer that the conversation waits for."""
        for _ in self.chat_interactive_v1("", session_id=session_id, cancel=True):
            pass

    def stream(self, *, messages: Sequence[Mapping[str, Any]], **options: Any) -> "ChatStream":
        """A chat answer as deltas, with `cancel`, as the gRPC client gives it."""
        body = {"model": self.model, "messages": list(messages), "stream": True, "stream_options": {"include_usage": True}}
        return ChatStream(self._send("POST", "/v1/chat/completions", body | options, stream=True))

    def _answers(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not body["stream"]:
            yield self._json("POST", path, body)
            return
        response = self._send("POST", path, body, stream=True)
        try:
            yield from _events(response)
        finally:
            response.close()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        response = self._send(method, path, body)
        try:
            return response.json()
        except ValueError:
            raise ServerError(f"{self.url}{path} answered no JSON: is it an OpenAI server?") from None

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, stream: bool = False) -> httpx.Response:
        try:
            response = self._http.send(self._http.build_request(method, path, json=body), stream=stream)
            if response.status_code != 200:
                response.read()
        except httpx.HTTPError as error:
            raise UnavailableError(f"no server answers at {self.url} ({error or type(error).__name__}); is it running?") from None
        if response.status_code != 200:
            status = response.status_code
            kind = _ERRORS.get(status, InvalidInputError if status < 500 else ServerError)
            raise kind(_message(response))
        return response

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def client(api_server_url: str = "http://127.0.0.1:23333", api_key: str | None = None) -> APIClient:
    """LMDeploy's call of this name: `turbotriton.client(...)`."""
    return APIClient(api_server_url, api_key)


def _is_local(url: str) -> bool:
    host = httpx.URL(url).host
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Objects of an event stream or of newline-delimited JSON. Raises ServerError for one that is an error or is cut off."""
    try:
        for line in response.iter_lines():
            text = line.removeprefix("data:").strip()
            if not text or text == "[DONE]":
                continue
            event = json.loads(text)
            if "error" in event:
                raise ServerError(str(event["error"].get("message", event["error"])))
            yield event
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(f"{response.url} ended the stream before the answer was complete: {error}") from None


class ChatStream:
    """Iterator of the deltas of a streamed chat answer; `cancel` ends it from any thread, also while nothing comes."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._is_cancelled = threading.Event()

    def __iter__(self) -> Iterator[Delta]:
        num_chunks, finish_reason = 0, None
        try:
            for event in _events(self._response):
                if usage := event.get("usage"):
                    yield Delta("", (), finish_reason, usage["prompt_tokens"], usage["completion_tokens"])
                for choice in event.get("choices", ()):
                    finish_reason = choice.get("finish_reason") or finish_reason
                    if text := choice["delta"].get("content"):
                        num_chunks += 1
                        yield Delta(text, (), None, 0, num_chunks)
        except ServerError:
            if not self._is_cancelled.is_set():
                raise
        finally:
            self._response.close()

    def cancel(self) -> None:
        self._is_cancelled.set()
        connection = self._response.extensions.get("network_stream")
        raw = connection.get_extra_info("socket") if connection is not None else None
        if raw is not None:
            with contextlib.suppress(OSError):  # it may be over
                raw.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._response.close()


class InteractiveConversation:
    """A terminal's conversation on /v1/chat/interactive (see `terminal.Conversation`); `describe` tells of the last answer."""

    def __init__(self, client: APIClient, session_id: int, **options: Any) -> None:
        self._client, self._session_id, self._options = client, session_id, options
        self._last: str | None = None

    def ask(self, question: str) -> Iterator[str]:
        self._last = None
        num_tokens = 0
        for text, num_tokens, _ in self._client.chat(question, self._session_id, stream=True, **self._options):  # noqa: B007
            yield text
        self._last = f"{num_tokens} tokens"

    def cancel(self) -> None:
        self._client.cancel(self._session_id)

    def end(self) -> None:
        self._client.end_session(self._session_id)

    def describe(self) -> str | None:
        return self._last
