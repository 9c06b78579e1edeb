"""A headless Chromium on the chat page, and the page's process. Without Chromium these tests are skipped, but fail in CI."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from turbotriton.cli.running_server import held_ports

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
]

#: Milliseconds until what a page has to show counts as missing; only a test that fails waits for so long.
PATIENCE_MS = 60_000


@contextmanager
def chat_page_server(grpc_url: str, *options: str) -> Iterator[str]:
    """`turbotriton serve gradio` on a free port; yields the page's address and checks that SIGTERM ends it cleanly."""
    with held_ports(1) as (port,), tempfile.TemporaryFile() as log:  # a pipe that nobody reads would hold up a talkative page
        command = [sys.executable, "-m", "turbotriton", "serve", "gradio", grpc_url, "--server-port", str(port), *options]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_for(url, process)
            yield url
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            log.seek(0)
            print(log.read().decode(errors="replace"))


def _wait_for(url: str, process: "subprocess.Popen[bytes]", timeout_s: float = 120.0) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, f"serve gradio ended with {process.returncode}"
        try:
            opener.open(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"no page at {url}")


@contextmanager
def chromium() -> Iterator[Any]:
    """A playwright Browser."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs Chromium: apt-get install chromium")
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class ChatPage:
    """The page as its visitor uses it."""

    def __init__(self, browser: Any, url: str) -> None:
        self.foreign_requests: list[str] = []
        self.console_errors: list[str] = []
        self.context = browser.new_context(viewport={"width": 1280, "height": 800})
        self.context.set_default_timeout(PATIENCE_MS)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self._note(request.url, url))
        self.page.on("pageerror", lambda error: self.console_errors.append(str(error)))
        self.page.goto(url)
        self.box = self.page.locator("#box textarea")
        self.box.wait_for()
        self.answers = self.page.locator("#chat .message.bot:not(.pending)")
        self.questions = self.page.locator("#chat .message.user")
        self.status = self.page.locator("#status")

    def _note(self, requested: str, url: str) -> None:
        if not requested.startswith((url, "data:", "blob:")):
            self.foreign_requests.append(requested)

    def ask(self, question: str) -> None:
        self.box.fill(question)
        self.box.press("Enter")

    def wait_status(self, pattern: str) -> None:
        import re

        from playwright.sync_api import expect

        expect(self.status).to_contain_text(re.compile(pattern))

    def ask_and_wait(self, question: str) -> None:
        """Until the whole answer is there. The status line alone does not tell: it may still be the last answer's, or be growing."""
        from playwright.sync_api import expect

        num_answers = self.answers.count()
        self.ask(question)
        expect(self.answers).to_have_count(num_answers + 1)  # Stop is shown from before its first piece until behind its last
        expect(self.stop_button).to_have_count(0)

    @property
    def stop_button(self) -> Any:
        return self.page.locator("#box button.stop-button")
