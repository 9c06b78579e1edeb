"""The web demo: one chat page on the text door, or on an OpenAI server.

The page's conversation lives in the page (a gr.State); nothing is shared between visitors but the connection. Every answer
is a stream of its own that `Answers` knows by the visitor's session: Stop, Clear and a closed tab cancel it there, so that
the engine frees its blocks at once. Nothing leaves for other hosts: no analytics, no share link, no fonts from elsewhere.
"""

import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol, Self

import gradio as gr

from turbotriton.contract.errors import InvalidInputError, TurbotritonError

from .api_client import APIClient
from .grpc_stream import Client
from .text_door import Delta

__all__ = ["Answers", "ChatClient", "build_page", "serve_page"]

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
REFRESH_S = 0.05  # how often a running answer is drawn
CSS = (Path(__file__).parent / "demo.css").read_text()
CLOSE_SIDEBAR_ON_PHONES = "() => { if (window.innerWidth < 768) document.querySelector('#settings .toggle-button')?.click(); }"
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "DejaVu Sans", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "DejaVu Sans Mono", "monospace"]

Message = dict[str, str]


class Stream(Protocol):
    """Deltas of one answer; `cancel` may be called from any thread."""

    def __iter__(self) -> Iterator[Delta]: ...

    def cancel(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None: ...


class ChatClient(Protocol):
    """What the page needs of `Client` and `APIClient`."""

    url: str

    @property
    def model(self) -> str: ...

    def stream(self, *, messages: list[Message], **options: Any) -> Stream: ...


class Answers:
    """The running answers by visitor. Thread-safe; one a visitor: a new one cancels the one before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, _Answer] = {}

    def start(self, visitor: str) -> "_Answer":
        self.stop(visitor)
        answer = _Answer()
        with self._lock:
            self._running[visitor] = answer
        return answer

    def finish(self, visitor: str, answer: "_Answer") -> None:
        with self._lock:
            if self._running.get(visitor) is answer:
                del self._running[visitor]

    def stop(self, visitor: str, *, discard: bool = False) -> None:
        """discard: what came so far is not to be shown any more."""
        with self._lock:
            answer = self._running.pop(visitor, None)
        if answer is not None:
            answer.stop(discard=discard)


class _Answer:
    """One answer from click to end, which may be stopped before its stream is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self.is_stopped = False
        self.is_discarded = False

    def attach(self, stream: Stream) -> None:
        with self._lock:
            self._stream = stream
            is_stopped = self.is_stopped
        if is_stopped:
            stream.cancel()

    def stop(self, *, discard: bool) -> None:
        with self._lock:
            self.is_stopped, self.is_discarded = True, discard
            stream = self._stream
        if stream is not None:
            stream.cancel()


class _Chat:
    """What the page's events call. `messages` is the conversation without the system prompt."""

    def __init__(self, client: ChatClient, answers: Answers) -> None:
        self._client = client
        self._answers = answers

    def greet(self) -> str:
        """The line under the title: what is served where, or why nothing is."""
        try:
            return _muted(f"{self._client.model} on {self._client.url}")
        except TurbotritonError as error:
            return _error(error)

    def ask(
        self,
        question: str,
        messages: list[Message],
        system: str,
        max_tokens: float,
        temperature: float,
        top_p: float,
        top_k: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        if not question.strip():
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        settings = _Settings(system, int(max_tokens), temperature, top_p, int(top_k))
        yield from self._answer([*messages, {"role": "user", "content": question}], settings, request.session_hash or "")

    def retry(
        self,
        messages: list[Message],
        system: str,
        max_tokens: float,
        temperature: float,
        top_p: float,
        top_k: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Asks the last question again, with the settings as they are now."""
        kept = list(messages)
        while kept and kept[-1]["role"] != "user":
            kept.pop()
        if not kept:
            yield gr.skip(), gr.skip(), gr.skip(), _muted("Nothing to retry yet.")
            return
        settings = _Settings(system, int(max_tokens), temperature, top_p, int(top_k))
        yield from self._answer(kept, settings, request.session_hash or "")

    def stop(self, request: gr.Request) -> None:
        self._answers.stop(request.session_hash or "")

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        self._answers.stop(request.session_hash or "", discard=True)
        return _idle_box(), [], [], ""

    def _answer(self, messages: list[Message], settings: "_Settings", visitor: str) -> Iterator[tuple[Any, ...]]:
        """Yields (question box, chat, messages, status line) while the answer to the last message comes in."""
        answer = self._answers.start(visitor)
        yield _busy_box(), _drawn(messages), messages, _muted("Waiting for the first token ...")
        meter = _Meter()
        text = ""
        try:
            stream = settings.open_stream(self._client, messages)
            answer.attach(stream)
            with stream:
                drawn = 0.0
                for delta in stream:
                    text += delta.text
                    meter.count(len(delta.output_ids), delta.num_output_tokens, delta.finish_reason)
                    if time.monotonic() - drawn > REFRESH_S and text:
                        drawn = time.monotonic()
                        so_far = [*messages, {"role": "assistant", "content": text}]
                        yield gr.skip(), _drawn(so_far), so_far, _muted(meter.line())
            status = _muted(meter.line(is_stopped=answer.is_stopped))
        except TurbotritonError as error:
            status = _error(error)
        finally:
            self._answers.finish(visitor, answer)
        if answer.is_discarded:  # the last word, in case a piece overtook the answer to Clear
            yield _idle_box(), [], [], ""
            return
        kept = [*messages, {"role": "assistant", "content": text}] if text else messages
        yield _idle_box(), _drawn(kept), kept, status


class _Settings(NamedTuple):
    """The sidebar's values."""

    system: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int

    def open_stream(self, client: ChatClient, messages: list[Message]) -> Stream:
        system = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return client.stream(
            messages=system + messages,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


class _Meter:
    """Counts one answer's tokens and time."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first: float | None = None
        self._last = self._started
        self._num_tokens = 0
        self._finish_reason: str | None = None

    def count(self, num_new: int, num_output: int, finish_reason: str | None) -> None:
        self._last = time.monotonic()
        if self._first is None:
            self._first = self._last
        self._num_tokens = max(self._num_tokens + num_new, num_output)
        self._finish_reason = finish_reason

    def line(self, *, is_stopped: bool = False) -> str:
        if self._first is None:
            return "stopped before the first token" if is_stopped else "the answer is empty"
        seconds = self._last - self._first
        speed = f" · {(self._num_tokens - 1) / seconds:.1f} tokens/s" if self._num_tokens > 1 and seconds > 0 else ""
        notes = " · stopped" if is_stopped else " · cut at max tokens" if self._finish_reason == "length" else ""
        return f"{self._num_tokens} tokens{speed} · first after {self._first - self._started:.2f} s{notes}"


def _muted(text: str) -> str:
    return f'<span class="muted">{_escape(text)}</span>'


def _error(error: TurbotritonError) -> str:
    return f'<span class="error" role="alert">{_escape(str(error))}</span>'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _drawn(messages: list[Message]) -> list[Message]:
    """messages as the Markdown that shows them as written: HTML outside of code is text, not markup."""
    return [{**message, "content": _as_markdown(message["content"])} for message in messages]


def _as_markdown(text: str) -> str:
    """Also turns pictures into links: an answer must not make the visitor's browser call other hosts."""
    parts = _CODE.split(text)  # outside, code, outside, code ...
    return "".join(part if index % 2 else _escape(part).replace("![", "\\![") for index, part in enumerate(parts))


def _busy_box() -> Any:
    return gr.update(value="", submit_btn=False, stop_btn=True)


def _idle_box() -> Any:
    return gr.update(submit_btn=True, stop_btn=False)


def build_page(client: ChatClient, answers: Answers) -> gr.Blocks:
    """The page, ready to launch. The server need not be there yet."""
    chat = _Chat(client, answers)
    with gr.Blocks(title="turbotriton", analytics_enabled=False, fill_height=True) as page:
        with gr.Sidebar(width=300, elem_id="settings"):
            gr.Markdown("### Settings")
            system = gr.Textbox(label="System prompt", lines=3, max_lines=10, placeholder="You are ...", elem_id="system")
            settings = [
                system,
                gr.Slider(1, 4096, 512, step=1, label="Max tokens", elem_id="max-tokens"),
                gr.Slider(
                    0, 2, 0, step=0.05, label="Temperature", info="0 always takes the likeliest token", elem_id="temperature"
                ),
                gr.Slider(0.01, 1, 1, step=0.01, label="Top p", elem_id="top-p"),
                gr.Slider(0, 200, 0, step=1, label="Top k", info="0 is off", elem_id="top-k"),
            ]
        with gr.Column(elem_id="main", scale=1):
            gr.HTML('<div id="title">turbotriton</div>', padding=False)
            served = gr.HTML(elem_id="served", padding=False)
            chatbot = gr.Chatbot(
                show_label=False,
                elem_id="chat",
                height="100%",
                scale=1,
                allow_tags=False,
                buttons=["copy"],
                layout="bubble",
                placeholder="Ask something to begin.",
            )
            status = gr.HTML(elem_id="status", padding=False)
            box = gr.Textbox(
                show_label=False,
                placeholder="Message ... (Enter sends, Shift+Enter starts a new line)",
                submit_btn=True,
                stop_btn=False,
                autofocus=True,
                lines=1,
                max_lines=8,
                elem_id="box",
            )
            with gr.Row(elem_id="actions"):
                retry = gr.Button("Retry", size="sm", elem_id="retry")
                clear = gr.Button("Clear", size="sm", elem_id="clear")
        messages = gr.State([])
        shown = [box, chatbot, messages, status]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        box.submit(chat.ask, [box, messages, *settings], shown, concurrency_limit=None, **hidden)
        retry.click(chat.retry, [messages, *settings], shown, concurrency_limit=None, **hidden)
        clear.click(chat.clear, None, shown, queue=False, **hidden)
        chatbot.clear(chat.clear, None, shown, queue=False, **hidden)
        box.stop(chat.stop, None, None, queue=False, **hidden)
        page.load(chat.greet, None, served, **hidden)
        page.load(None, None, None, js=CLOSE_SIDEBAR_ON_PHONES)
        page.unload(chat.stop)
    return page


def _open_client(url: str, model: str | None, api_key: str | None) -> Client | APIClient:
    return APIClient(url, api_key, model=model) if url.startswith(("http://", "https://")) else Client(url, model)


def serve_page(url: str, *, model: str | None, server_name: str, server_port: int, api_key: str | None = None) -> int:
    """Serves the page until SIGINT or SIGTERM. url: HOST:PORT of tritonserver's gRPC, or an OpenAI server's http(s) URL, which gets
    `api_key`. Raises InvalidInputError when the address cannot be taken."""
    if not 0 < server_port < 65536:
        raise InvalidInputError(f"--server-port is {server_port}; it must be from 1 to 65535")
    with _open_client(url, model, api_key) as client:
        page = build_page(client, Answers())
        page.queue(api_open=False)
        try:
            page.launch(
                server_name=server_name,
                server_port=server_port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                footer_links=[],
                theme=gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="lg", font=FONTS, font_mono=MONOSPACE),
                css=CSS,
            )
        except OSError as error:
            raise InvalidInputError(
                f"{server_name}:{server_port} cannot be taken ({error}); choose another --server-port or --server-name"
            ) from None
        print(f"Chat page at http://{server_name}:{server_port} for the model on {url}; Ctrl-C stops it.", flush=True)
        _wait_for_signal()
        page.close(verbose=False)
    return 0


def _wait_for_signal() -> None:
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.set()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    while not stopped.wait(0.5):
        pass
