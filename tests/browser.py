"""Pages in a headless Chromium, and the page of `serve gradio` over any source. Both live in this process."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tritonmind_tools.console_transport import Source
from tritonmind_tools.ports import free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tritonmind_tools.gradio_app.session import Sessions

TIMEOUT_MS = 120_000
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that nothing else has used; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=path, args=list(_FLAGS))
        yield browser
        browser.close()


@dataclass
class Chat:
    """One visitor: what a person does and sees. foreign: addresses of other hosts that were asked for something."""

    page: Page
    url: str
    foreign: list[str]

    @classmethod
    def open(cls, browser: Browser, url: str, **settings: Any) -> Chat:
        page = browser.new_context(**settings).new_page()
        page.set_default_timeout(TIMEOUT_MS)
        chat = cls(page, url, [])
        page.on("requestfinished", lambda request: chat._note(request.url))
        # What the page's own policy forbids is never sent.
        page.on("requestfailed", lambda request: None if request.failure == "csp" else chat._note(request.url))
        page.goto(url)
        page.wait_for_selector("#tm-box textarea")
        return chat

    def _note(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(url)

    def close(self) -> None:
        self.page.context.close()

    def ask(self, text: str) -> None:
        self.page.fill("#tm-box textarea", text)
        self.page.press("#tm-box textarea", "Enter")

    def press(self, name: str) -> None:
        """Press the last button of that name below the messages."""
        self.page.locator(f"#tm-chat button[aria-label='{name}']").last.click()

    def stop(self) -> None:
        # Not click(), which waits for a button that stands still: an answer that grows moves it.
        self.page.dispatch_event("#tm-box .stop-button", "click")

    def set(self, **options: str) -> None:
        """Type into fields of the settings, which are open afterwards."""
        if not self.page.locator(".sidebar.open").count():
            self.page.click(".sidebar .toggle-button")
        for name, value in options.items():
            self.page.fill(f"#tm-{name} :is(input, textarea)", value)

    def expect(self, selector: str, text: str) -> None:
        """Wait until the last element of `selector` has `text`."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector).last).to_contain_text(text, timeout=TIMEOUT_MS)

    def expect_answer(self, text: str) -> None:
        """Wait until the last answer has `text` and is at its end."""
        self.expect("#tm-chat .bot.message", text)
        self.page.wait_for_selector("#tm-box .submit-button")

    @property
    def answer(self) -> str:
        return self.page.locator("#tm-chat .bot.message").last.inner_text()

    @property
    def texts(self) -> list[str]:
        """Questions and answers as they are shown."""
        messages = self.page.locator("#tm-chat :is(.user, .bot).message").all_inner_texts()
        return [text.strip() for text in messages]


@dataclass
class Served:
    url: str
    sessions: Sessions


@contextmanager
def page_of(source: Source, port: int | None = None) -> Iterator[Served]:
    """The page of `serve gradio` over a source."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from tritonmind_tools.gradio_app.serve import PageServer

    port = port or free_port()
    server = PageServer(source, host="127.0.0.1", port=port, num_answers=8)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    try:
        yield Served(f"http://127.0.0.1:{port}", server.sessions)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
