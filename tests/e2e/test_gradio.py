"""The chat page in a real Chromium, in front of a real tritonserver."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from tests.client.browser import ChatPage, chat_page_server, chromium
from tests.throttle import throttled

from .engine import PATIENCE_S, cancelling, wait_until, watched
from .metrics import metric, wait_idle
from .openai_server import api_server
from .processes import LONG_STORY, engine_pid
from .server import TritonServer

pytestmark = [pytest.mark.e2e, pytest.mark.browser]

SCREENSHOT = Path(__file__).resolve().parents[2] / "docs" / "images" / "gradio.png"
TALK = ("Hello! Who are you?", "What is 17 + 25?", "Spell the word lantern.")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_url(demo_server: TritonServer, browser: Any) -> Iterator[str]:
    with chat_page_server(demo_server.grpc_url) as url:
        yield url


@pytest.fixture
def chat(browser: Any, page_url: str) -> Iterator[ChatPage]:
    page = ChatPage(browser, page_url)
    yield page
    page.context.close()
    assert page.foreign_requests == []
    assert page.console_errors == []


def test_a_conversation_streams_with_its_speed(chat: ChatPage, demo_server: TritonServer) -> None:
    expect(chat.page.locator("#served")).to_contain_text(f"on {demo_server.grpc_url}")
    for number, question in enumerate(TALK, start=1):
        chat.ask_and_wait(question)
        expect(chat.answers).to_have_count(number)
        chat.wait_status(r"^\s*\d+ tokens")
    assert all(text.strip() for text in chat.answers.all_inner_texts())
    if os.environ.get("TURBOTRITON_UPDATE_SCREENSHOTS"):
        SCREENSHOT.parent.mkdir(parents=True, exist_ok=True)
        chat.box.blur()
        chat.page.screenshot(path=SCREENSHOT)


def test_stop_returns_the_answers_blocks_at_the_engine(chat: ChatPage, demo_server: TritonServer) -> None:
    """The engine is slowed down, so that the answer is still being made when Stop is clicked."""
    with cancelling(demo_server), throttled(engine_pid(demo_server)):
        chat.ask(LONG_STORY)
        wait_until(lambda: metric(demo_server, "turbotriton_kv_cache_usage") > 0, "blocks being held")
        chat.stop_button.click()
        chat.wait_status("stopped")
    wait_idle(demo_server)


def test_retry_replaces_the_answer_and_clear_empties_the_page(chat: ChatPage, demo_server: TritonServer) -> None:
    chat.ask_and_wait(TALK[0])
    first = chat.answers.last.text_content() or ""
    with watched(demo_server) as engine:
        ended = sum(engine.stats().requests_total.values())
        chat.page.locator("#retry").click()
        wait_until(lambda: sum(engine.newest.requests_total.values()) == ended + 1, "another answer")
    expect(chat.stop_button).to_have_count(0)
    chat.wait_status("tokens")
    expect(chat.answers).to_have_count(1)
    expect(chat.answers.last).to_have_text(first)  # temperature 0
    chat.page.locator("#clear").click()
    expect(chat.questions).to_have_count(0)
    expect(chat.answers).to_have_count(0)


def test_closing_the_tab_returns_the_blocks(browser: Any, page_url: str, demo_server: TritonServer) -> None:
    chat = ChatPage(browser, page_url)
    with throttled(engine_pid(demo_server)), cancelling(demo_server):  # slow until the page has noticed, or it may end before
        chat.ask(LONG_STORY)
        expect(chat.answers).to_have_count(1)
        chat.context.close()
    wait_idle(demo_server)


@pytest.mark.slow
def test_a_stopped_server_is_named_and_answers_again_when_it_is_back(browser: Any, demo_workspace: Path) -> None:
    with TritonServer(demo_workspace / "model_repository") as server, chat_page_server(server.grpc_url) as url:
        chat = ChatPage(browser, url)
        expect(chat.page.locator("#served")).to_contain_text(server.grpc_url)
        server.stop()
        chat.ask("Hello")
        chat.wait_status(f"no tritonserver answers at {server.grpc_url}")
        server.start()

        def is_answered() -> bool:  # as a visitor would: again, when the connection was not up yet
            chat.page.locator("#retry").click()
            chat.page.wait_for_timeout(3000)
            return bool(chat.answers.count())

        wait_until(is_answered, "an answer of the server that is back", 2 * PATIENCE_S)
        chat.context.close()


@pytest.mark.slow
def test_page_on_a_workspace_starts_and_stops_its_own_server(browser: Any, demo_workspace: Path) -> None:
    others = _servers_of(demo_workspace)
    with chat_page_server(str(demo_workspace)) as url:
        chat = ChatPage(browser, url)
        chat.ask_and_wait(TALK[1])
        chat.wait_status(r"^\s*\d+ tokens")
        assert chat.answers.last.inner_text().strip()
        chat.context.close()
        (pid,) = _servers_of(demo_workspace) - others
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_page_on_an_openai_server_answers_and_stops(browser: Any, demo_server: TritonServer) -> None:
    """Stop reaches the engine through the OpenAI server, also while nothing comes: the engine is paused then."""
    with api_server(demo_server.grpc_url, "--api-keys", "secret") as openai_url:
        with chat_page_server(openai_url) as url:
            page = ChatPage(browser, url)
            expect(page.page.locator("#served")).to_contain_text("valid api key")
            page.context.close()
        with chat_page_server(f"{openai_url}/v1", "--api-key", "secret") as url:
            chat = ChatPage(browser, url)
            expect(chat.page.locator("#served")).to_contain_text(f"demo on {openai_url}")
            chat.ask_and_wait(TALK[1])
            chat.wait_status(r"^\s*\d+ tokens · .*tokens/s · first after")
            assert chat.answers.last.inner_text().strip()
            with cancelling(demo_server), throttled(engine_pid(demo_server)) as throttle:  # an answer is over soon otherwise
                chat.ask(LONG_STORY)
                wait_until(lambda: metric(demo_server, "turbotriton_kv_cache_usage") > 0, "blocks being held")
                with throttle.paused():
                    chat.stop_button.click()
                    chat.wait_status("stopped")
            wait_idle(demo_server)
            assert chat.foreign_requests == []
            assert chat.console_errors == []
            chat.context.close()


def _servers_of(workspace: Path) -> set[int]:
    mark = f"--model-repository={workspace.resolve() / 'model_repository'}".encode()
    return {int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mark in _arguments(entry)}


def _arguments(entry: Path) -> list[bytes]:
    try:
        return (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
