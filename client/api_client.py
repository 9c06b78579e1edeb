"""A client of the OpenAI server without the `openai` package: LMDeploy's `APIClient`, and conversations for terminal and web page."""

import contextlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    model: of `stream`; None: the first that the server has.
    certificate: of the server or of who signed it, PEM; None: one that this machine knows (OpenSSL's store, SSL_CERT_FILE).
    Raises InvalidInputError (4xx), UnavailableError (429, 503, no server), ServerError. Thread-safe.
    """

    def __init__(
        self, api_server_url: str, api_key: str | None = None, *, model: str | None = None, certificate: Path | None = None
    ) -> None:
        _check_url(api_server_url)
        self.url = api_server_url.rstrip("/").removesuffix("/v1")
        options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            "trust_env": not _is_local(self.url),
            "verify": ssl.create_default_context(cafile=certificate) if self.url.startswith("https") else False,
        }
        self._http = httpx.Client(**options)
        self._streams = httpx.Client(**options, limits=httpx.Limits(max_keepalive_connections=0))  # see ChatStream
        self._model = model
        self._models: list[str] | None = None

    @property
    def available_models(self) -> list[str]:
        """Asked once."""
        if self._models is None:
            self._models = [entry["id"] for entry in self._json("GET", "/v1/models")["data"]]
        return self._models

    @property
    def model(self) -> str:
        """The one that was given, or the first that the server has."""
        if self._model is not None:
            return self._model
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
        """A chat answer as deltas, with `cancel`, as the gRPC client gives it. Failures come with the first delta."""
        body = {"model": self.model, "messages": list(messages), "stream": True, "stream_options": {"include_usage": True}}

        def send(trace: Callable[[str, dict[str, Any]], None]) -> httpx.Response:
            request = self._streams.build_request(
                "POST", "/v1/chat/completions", json=body | options, extensions={"trace": trace}
            )
            return self._checked(lambda: self._streams.send(request, stream=True))

        return ChatStream(send)

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
        return self._checked(lambda: self._http.send(self._http.build_request(method, path, json=body), stream=stream))

    def _checked(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        try:
            response = send()
            if response.status_code != 200:
                response.read()
        except (httpx.HTTPError, OSError) as error:
            raise UnavailableError(f"no server answers at {self.url} ({error or type(error).__name__}); is it running?") from None
        if response.status_code != 200:
            status = response.status_code
            kind = _ERRORS.get(status, InvalidInputError if status < 500 else ServerError)
            raise kind(_message(response))
        return response

    def close(self) -> None:
        self._http.close()
        self._streams.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _check_url(url: str) -> None:
    try:
        parsed = httpx.URL(url)
        is_one = parsed.scheme in ("http", "https") and bool(parsed.host) and parsed.port != 0 and (parsed.port or 1) < 65536
    except (httpx.InvalidURL, ValueError):
        is_one = False
    if not is_one or re.search(r"\s", url):
        raise InvalidInputError(
            f"address {url!r} is no http:// or https:// URL of an OpenAI server, such as http://localhost:23333"
        )


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
    """Iterator of the deltas of a streamed chat answer; `cancel` ends it from any thread, also while nothing comes.

    `send(trace)` asks for it on a connection of its own; `trace` gets httpx's events, among them that connection's socket. Shutting
    that down wakes the thread that reads.
    """

    def __init__(self, send: Callable[[Callable[[str, dict[str, Any]], None]], httpx.Response]) -> None:
        self._send = send
        self._response: httpx.Response | None = None
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None  # under the lock
        self._is_cancelled = False  # under the lock

    def __iter__(self) -> Iterator[Delta]:
        """Raises as APIClient does; ends quietly after `cancel`."""
        num_chunks, finish_reason = 0, None
        try:
            self._response = self._send(self._note)
            for event in _events(self._response):
                if usage := event.get("usage"):
                    yield Delta("", (), finish_reason, usage["prompt_tokens"], usage["completion_tokens"])
                for choice in event.get("choices", ()):
                    finish_reason = choice.get("finish_reason") or finish_reason
                    if text := choice["delta"].get("content"):
                        num_chunks += 1
                        yield Delta(text, (), None, 0, num_chunks)
        except (ServerError, UnavailableError):
            if not self._is_cancelled:
                raise
        finally:
            self._close()

    def _note(self, event: str, info: dict[str, Any]) -> None:
        if event not in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            return
        with self._lock:
            self._socket = info["return_value"].get_extra_info("socket")
        if self._is_cancelled:
            self._shut_down()

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
        self._shut_down()

    def _shut_down(self) -> None:
        with self._lock:
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it may be over
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _close(self) -> None:
        if self._response is not None:
            self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._close()


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
