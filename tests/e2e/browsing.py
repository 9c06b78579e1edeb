"""A visitor of a chat page, for documentation that says "Open <http://...>"."""

from typing import Any

from playwright.sync_api import expect
from tests.client.browser import ChatPage


class Visitor:
    """Asks one question on each page that it is sent to. `urls`: where it was."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self.urls: list[str] = []

    def __call__(self, url: str) -> None:
        page = ChatPage(self._browser, url)
        page.ask_and_wait("What is 2 + 3?")
        page.wait_status(r"^\s*\d+ tokens")
        expect(page.answers.last).to_contain_text("5")
        assert page.foreign_requests == []
        page.context.close()
        self.urls.append(url)
