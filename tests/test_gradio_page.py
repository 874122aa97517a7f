"""The page of `serve gradio` in a real browser: over a model that is told what to say, and over real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import pytest

from tests.browser import Chat, Served, chromium, page_of
from tests.fake_transport import FakeTransport
from tritonmind_tools.console_transport import Delta, Message, Status

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
RICH = """A **table** and *code*:

| engine | tokens/s |
|---|---:|
| fp16 | 198 |

```python
def softmax(x):
    return np.exp(x) / np.exp(x).sum()  # a line that is wider than the screen of any phone ever was
```

$$\\sigma(x)_i = \\frac{e^{x_i}}{\\sum_j e^{x_j}}$$ It costs $5 or $10. <script>document.title = "broken"</script>
<img src="http://192.0.2.1/a.png" onerror="document.title = 'broken'"> ![b](http://192.0.2.1/b.png)
"""


class Model(FakeTransport):
    """Also: `rich` answers with everything that Markdown has."""

    def stream(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Generator[Delta, None, None]:
        if messages[-1]["content"] != "rich":
            yield from super().stream(messages, options)
            return
        for start in range(0, len(RICH), 40):
            yield Delta(text=RICH[start : start + 40], num_tokens=10, num_input_tokens=5)
        yield Delta(finish_reason="stop")


class Models:
    """A source that remembers the transports it gave."""

    def __init__(self) -> None:
        self.given: list[Model] = []
        self.lost = threading.Event()

    def connect(self) -> Model:
        self.given.append(Model())
        return self.given[-1]

    def status(self) -> Status:
        is_ready = not self.lost.is_set()
        return Status(is_ready=is_ready, text="a <fake> model" if is_ready else "nobody answers")

    def close(self) -> None:
        pass

    def seen(self) -> list[list[str]]:
        """The contents of the messages of each question, of all visitors."""
        return [[message["content"] for message in asked] for model in self.given for asked in model.seen]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def source() -> Models:
    return Models()


@pytest.fixture(scope="module")
def served(source: Models) -> Iterator[Served]:
    with page_of(source) as served:
        yield served


@pytest.fixture
def visit(browser: Any, served: Served, source: Models) -> Iterator[Callable[..., Chat]]:
    """Opens the page for a new visitor; nobody asks another host for anything."""
    source.given.clear()
    chats: list[Chat] = []

    def open_page(**settings: Any) -> Chat:
        chats.append(Chat.open(browser, served.url, **settings))
        return chats[-1]

    yield open_page
    for chat in chats:
        chat.close()
        assert chat.foreign == []


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_conversation(visit: Callable[..., Chat], source: Models) -> None:
    chat = visit()
    chat.expect(".tm-status", "a <fake> model")
    chat.ask("one")
    chat.expect_answer("said: one")
    chat.expect(".tm-note", "prompt 7 tokens, 0 cached · answer 5 tokens")
    chat.ask("slow")
    chat.expect("#tm-chat .bot.message", "word1 ")
    first = chat.answer
    wait_until(lambda: len(chat.answer) > len(first))
    assert chat.answer.startswith(first.strip())
    chat.page.fill("#tm-box textarea", "typed meanwhile")
    chat.stop()
    chat.page.wait_for_selector("#tm-box .submit-button")
    chat.expect(".tm-note", "cancelled")
    assert chat.page.input_value("#tm-box textarea") == "typed meanwhile"
    chat.ask("two")
    chat.expect_answer("said: two")
    asked = source.seen()[-1]
    assert asked[:3] == ["one", "said: one", "slow"] and asked[3].startswith("word0 word1") and asked[4:] == ["two"]


def test_retry_edit_undo_and_a_new_chat(visit: Callable[..., Chat], source: Models) -> None:
    chat = visit()
    chat.ask("one")
    chat.expect_answer("said: one")
    chat.ask("two")
    chat.expect_answer("said: two")
    chat.press("Retry")
    wait_until(lambda: len(source.seen()) == 3)
    chat.expect_answer("said: two")
    assert source.seen()[1] == source.seen()[2] == ["one", "said: one", "two"]
    chat.page.locator("#tm-chat button[aria-label='Edit']").first.click()
    chat.page.locator("#tm-chat textarea").first.fill("uno")
    chat.page.locator("#tm-chat button[aria-label='Submit']").click()
    chat.expect_answer("said: uno")
    assert source.seen()[3] == ["uno"] and chat.texts == ["uno", "said: uno"]
    chat.press("Undo")
    chat.page.wait_for_function("document.querySelector('#tm-box textarea').value == 'uno'")
    assert chat.texts == []
    chat.ask("slow")
    chat.expect("#tm-chat .bot.message", "word1 ")
    chat.page.click("#tm-new")
    chat.page.wait_for_selector("#tm-box .submit-button")
    assert chat.texts == []
    chat.ask("three")
    chat.expect_answer("said: three")
    assert source.seen()[-1] == ["three"] and chat.texts == ["three", "said: three"]


def test_settings_are_sent_and_a_wrong_one_keeps_the_question(visit: Callable[..., Chat], source: Models) -> None:
    chat = visit()
    chat.set(system="Be brief.", temperature="0.5", stop='["a", "b"]', top_k="-1")
    chat.ask("one")
    chat.expect(".tm-problem", "Top_k=-1 is invalid: must be 0 (all tokens) or positive.")
    assert chat.page.input_value("#tm-box textarea") == "one" and source.given == []
    chat.set(top_k=" 4 ")
    chat.ask("one")
    chat.expect_answer("said: one")
    assert source.seen() == [["Be brief.", "one"]]
    assert source.given[0].options == [{"temperature": 0.5, "stop": ("a", "b"), "top_k": 4}]


def test_what_failed_says_why_and_is_no_history(visit: Callable[..., Chat], source: Models) -> None:
    chat = visit()
    chat.ask("lost")
    chat.expect_answer("No answer. The connection is lost ([Errno 111] *refused*). Try again with the arrow below.")
    chat.press("Retry")
    wait_until(lambda: source.seen() == [["lost"], ["lost"]])
    chat.expect_answer("No answer.")
    chat.ask("long")
    chat.expect_answer("session_len is 512")
    chat.expect_answer("edit a question further up, or begin a new chat")
    chat.ask("silent")
    wait_until(lambda: len(source.seen()) == 4)
    chat.stop()
    chat.expect_answer("Stopped before the first word.")
    chat.ask("one")
    chat.expect_answer("said: one")
    assert source.seen()[2:] == [["long"], ["silent"], ["one"]]
    source.lost.set()
    chat.expect(".tm-lost", "nobody answers")
    source.lost.clear()
    chat.expect(".tm-ready", "a <fake> model")


def test_visitors_have_their_own_conversations(visit: Callable[..., Chat], source: Models, served: Served) -> None:
    first, second = visit(), visit()
    first.ask("slow")
    first.expect("#tm-chat .bot.message", "word1 ")
    second.ask("one")
    second.expect_answer("said: one")
    second.ask("two")
    second.expect_answer("said: two")
    assert second.texts == ["one", "said: one", "two", "said: two"]
    assert first.page.locator("#tm-box .stop-button").count() == 1
    slow = next(model for model in source.given if model.seen[0][0]["content"] == "slow")
    # A visitor who leaves gives the answer up; the other one goes on.
    assert not slow._cancelled.is_set()
    first.close()
    wait_until(slow._cancelled.is_set)
    wait_until(lambda: len(served.sessions) == 1 and slow.is_closed)
    second.ask("three")
    second.expect_answer("said: three")


def test_a_page_whose_own_server_comes_back(browser: Any, source: Models) -> None:
    with page_of(source) as served:
        chat = Chat.open(browser, served.url)
        chat.ask("one")
        chat.expect_answer("said: one")
        chat.ask("slow")
        chat.expect("#tm-chat .bot.message", "word1 ")
    with page_of(source, int(served.url.rpartition(":")[2])):
        # Gradio often does so by itself when a page's server is another one now.
        chat.page.reload()
        chat.page.wait_for_selector("#tm-box .submit-button")
        wait_until(lambda: len(chat.texts) == 4)
        chat.ask("two")
        chat.expect_answer("said: two")
        assert chat.texts[:3] == ["one", "said: one", "slow"] and len(chat.texts) == 6
        assert source.seen()[-1][:2] == ["one", "said: one"] and len(source.seen()[-1]) == 5
        chat.close()


@pytest.mark.parametrize("settings", [{"viewport": {"width": 1280, "height": 800}}, PHONE], ids=["desktop", "phone"])
def test_rich_answers_fit_the_page(visit: Callable[..., Chat], settings: dict[str, Any]) -> None:
    chat = visit(**settings)
    chat.ask("rich")
    chat.expect_answer("It costs $5 or $10.")
    page = chat.page
    for selector in ("table", "pre code .token", ".katex-display", "strong", "em"):
        assert page.locator(f"#tm-chat .bot.message {selector}").count(), selector
    assert page.title() == "tritonmind"
    width = settings["viewport"]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = {name: page.locator(name).bounding_box() for name in ("#tm-top", "#tm-chat", "#tm-box", "#tm-note")}
    bottom = 0.0
    for name, box in boxes.items():
        assert box is not None and box["y"] >= bottom - 1, f"{name} lies over what is above it"
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
        bottom = box["y"] + box["height"]
    assert bottom <= settings["viewport"]["height"]
    title, status, button = (page.locator(name).bounding_box() for name in (".tm-name", ".tm-status", "#tm-new"))
    assert title and status and button and max(box["x"] + box["width"] for box in (title, status)) <= button["x"]


def test_dark_follows_the_system_or_the_button(visit: Callable[..., Chat]) -> None:
    chat = visit(color_scheme="dark")
    is_dark = "document.body.classList.contains('dark')"
    chat.page.wait_for_function(is_dark)
    chat.page.click("#tm-theme")
    chat.page.wait_for_function(f"!{is_dark}")
    chat.page.reload()
    chat.page.wait_for_selector("#tm-box textarea")
    chat.page.wait_for_function(f"!{is_dark}")
    time.sleep(2)
    assert not chat.page.evaluate(is_dark)
