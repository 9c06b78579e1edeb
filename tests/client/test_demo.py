"""The chat page in a real Chromium, the fake server behind."""

import time

import pytest
from playwright.sync_api import expect
from tests.client.browser import ChatPage, chat_page_server, chromium
from tests.client.fake_server import FakeTriton

from turbotriton.cli.running_server import held_ports

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server():
    with FakeTriton() as fake:
        yield fake


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_url(server, browser):
    with chat_page_server(server.url) as url:
        yield url


@pytest.fixture
def fake(server):
    server.go_on()
    server.seen.clear()
    return server


@pytest.fixture
def chat(fake, browser, page_url):
    page = ChatPage(browser, page_url)
    yield page
    page.context.close()
    assert page.foreign_requests == []
    assert page.console_errors == []


def wait_until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def ask_and_see_the_beginning(chat, fake):
    """The answer stands still behind twenty tokens of 405."""
    fake.token_delay_s = 0.06  # longer than between two drawings
    fake.hold_after(20)
    chat.ask("x" * 400)
    expect(chat.answers.last).to_contain_text("echo:XXX")
    fake.token_delay_s = 0.0


def test_an_answer_streams_in_and_its_speed_is_shown(chat, fake):
    expect(chat.page.locator("#served")).to_contain_text(f"chatty on {fake.url}")
    fake.token_delay_s = 0.06  # longer than between two drawings
    fake.hold_after(12)
    chat.ask("hello there, page")
    expect(chat.answers.last).to_contain_text("echo:HEL")
    assert "PAGE" not in chat.answers.last.inner_text()
    fake.token_delay_s = 0.0
    fake.go_on()
    expect(chat.answers.last).to_contain_text("echo:HELLO THERE, PAGE")
    chat.wait_status(r"22 tokens · [\d.]+ tokens/s · first after [\d.]+ s\s*$")
    expect(chat.box).to_have_value("")


def test_the_second_question_sends_the_whole_conversation(chat, fake):
    import json

    chat.ask_and_wait("one")
    chat.ask("two")
    expect(chat.answers.last).to_contain_text("echo:TWO")
    wait_until(lambda: len(fake.seen) == 2)
    assert json.loads(fake.seen[1].inputs["messages"][0]) == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "echo:ONE"},
        {"role": "user", "content": "two"},
    ]


def test_stop_cancels_the_request_and_keeps_what_came(chat, fake):
    ask_and_see_the_beginning(chat, fake)
    chat.stop_button.click()
    chat.wait_status("stopped")
    wait_until(lambda: fake.seen[0].is_cancelled)
    assert chat.answers.last.inner_text().startswith("echo:XXX")
    fake.go_on()
    chat.ask("next")
    expect(chat.answers.last).to_contain_text("echo:NEXT")


def test_retry_asks_the_last_question_again_and_replaces_the_answer(chat, fake):
    chat.ask_and_wait("again")
    chat.page.locator("#retry").click()
    wait_until(lambda: len(fake.seen) == 2)
    chat.wait_status("tokens")
    expect(chat.answers).to_have_count(1)
    expect(chat.questions).to_have_count(1)


def test_clear_empties_the_conversation_and_stops_a_running_answer(chat, fake):
    ask_and_see_the_beginning(chat, fake)
    chat.page.locator("#clear").click()
    wait_until(lambda: fake.seen[0].is_cancelled)
    expect(chat.questions).to_have_count(0)
    time.sleep(0.5)  # a late piece of the stopped answer must not bring it back
    expect(chat.answers).to_have_count(0)
    expect(chat.questions).to_have_count(0)


def test_settings_reach_the_server(chat, fake):
    import json

    chat.page.locator("#system textarea").fill("Be brief.")
    for name, value in (("max-tokens", "7"), ("temperature", "0.5"), ("top-p", "0.25"), ("top-k", "9")):
        field = chat.page.locator(f"#{name} input[type=number]")
        field.fill(value)
        field.press("Tab")
    chat.ask("hello")
    chat.wait_status("7 tokens.*cut at max tokens")
    inputs = fake.seen[0].inputs
    assert json.loads(inputs["messages"][0])[0] == {"role": "system", "content": "Be brief."}
    assert [inputs[name].item() for name in ("max_tokens", "temperature", "top_p", "top_k")] == [7, 0.5, 0.25, 9]


def test_closing_the_tab_cancels_the_answer(chat, fake):
    ask_and_see_the_beginning(chat, fake)
    chat.page.close()
    wait_until(lambda: fake.seen[0].is_cancelled)


def test_markup_in_an_answer_is_text_and_pictures_elsewhere_are_not_loaded(chat):
    chat.ask_and_wait("<img src=x onerror=alert(1)><b>hi</b> ![p](http://example.invalid/p.png) `<i>`")
    expect(chat.answers.last).to_contain_text("<IMG SRC=X ONERROR=ALERT(1)><B>HI</B>")
    expect(chat.answers.last.locator("code")).to_have_text("<I>")
    assert chat.page.locator("#chat img[src=x]").count() == 0


def test_an_error_of_the_server_is_shown_and_the_question_stays(chat, fake):
    fake.fail_stream_with = "UNAVAILABLE: the queue is full (128 requests); try again later"
    chat.ask("hello")
    chat.wait_status("the queue is full .128 requests.; try again later")
    expect(chat.page.locator("#status .error")).to_be_visible()
    expect(chat.questions.last).to_contain_text("hello")
    chat.page.locator("#retry").click()
    expect(chat.answers.last).to_contain_text("echo:HELLO")


def test_a_server_that_is_away_is_named_and_found_again_when_it_returns(browser):
    with held_ports(1) as (port,), chat_page_server(f"127.0.0.1:{port}") as page_url:
        url = f"127.0.0.1:{port}"
        chat = ChatPage(browser, page_url)
        expect(chat.page.locator("#served .error")).to_contain_text(f"no tritonserver answers at {url}")
        chat.ask("hello")
        chat.wait_status(f"no tritonserver answers at {url}")
        expect(chat.box).to_be_enabled()
        chat.context.close()


def test_a_taken_port_is_one_line_and_exit_2(page_url):
    import os
    import subprocess
    import sys

    command = [sys.executable, "-m", "turbotriton", "serve", "gradio", "127.0.0.1:1", "--server-port", page_url.rsplit(":", 1)[1]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 2
    assert "choose another --server-port" in done.stderr
