"""The page: its parts, and what happens when one of them is used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from tritonmind.errors import InvalidRequestError
from tritonmind_tools.gradio_app import chat_view, look
from tritonmind_tools.gradio_app.chat_view import Shown
from tritonmind_tools.gradio_app.session import Sessions, Watch

# What the panel offers: the option of SamplingParams, its label. Empty ones are the model's own.
PANEL: tuple[tuple[tuple[str, str], ...], ...] = (
    (("temperature", "Temperature"), ("max_tokens", "Max tokens")),
    (("top_p", "Top p"), ("top_k", "Top k")),
    (("min_p", "Min p"), ("repetition_penalty", "Repetition")),
    (("presence_penalty", "Presence"), ("frequency_penalty", "Frequency")),
    (("seed", "Seed"), ("stop", "Stop at")),
)
OPTION_NAMES = tuple(name for row in PANEL for name, _ in row)
_PANEL_TEXT = (
    '<div class="tm-panel-text">Sampling. Empty fields are the model\'s own values; the three penalties make a text '
    "repeat itself less.</div>"
)

# Seconds between two looks at a growing answer, and at the server.
_REFRESH_S = 0.05
_STATUS_PERIOD_S = 3.0

_Updates = tuple[Any, Any, Any]  # of the chat, the box and the note


class Page:
    """One page for all visitors; what differs between them is in their session and in what their browser sends."""

    def __init__(self, sessions: Sessions, watch: Watch) -> None:
        self._sessions = sessions
        self._watch = watch
        with gr.Blocks(title="tritonmind", analytics_enabled=False, fill_width=True, fill_height=True) as self.blocks:
            self._build_panel()
            self._build_chat()
            self._connect_events()
        self.blocks.queue(default_concurrency_limit=None, api_open=False)

    def _build_panel(self) -> None:
        with gr.Sidebar(label="Settings", position="left", open=False, width=320), gr.Column(elem_classes="tm-panel"):
            self._system = gr.Textbox(
                label="System prompt", placeholder="None: the model's own, if it has one", lines=4, elem_id="tm-system"
            )
            gr.HTML(_PANEL_TEXT, container=False, padding=False)
            self._fields: list[gr.Textbox] = []
            for row in PANEL:
                with gr.Row():
                    self._fields += [self._field(name, label) for name, label in row]

    def _field(self, name: str, label: str) -> gr.Textbox:
        return gr.Textbox(label=label, placeholder="default", min_width=80, max_lines=1, elem_id=f"tm-{name}")

    def _build_chat(self) -> None:
        with gr.Column(elem_id="tm-page"):
            with gr.Row(elem_id="tm-top"):
                self._header = gr.HTML(chat_view.header(self._watch.status()), container=False, padding=False)
                self._settings = gr.Button("Settings", size="sm", elem_id="tm-settings")
                self._new = gr.Button("New chat", size="sm", elem_id="tm-new")
                self._theme = gr.Button("◐", size="sm", elem_id="tm-theme")
            self._chat = gr.Chatbot(
                elem_id="tm-chat",
                show_label=False,
                container=False,
                height=None,
                editable="user",
                buttons=["copy"],
                feedback_options=None,
                latex_delimiters=look.LATEX_DELIMITERS,
                reasoning_tags=[("<think>", "</think>")],
                placeholder="Ask something. Enter sends, Shift+Enter begins a new line.",
            )
            self._box = gr.Textbox(
                elem_id="tm-box",
                show_label=False,
                container=False,
                placeholder="Message",
                max_lines=8,
                autofocus=True,
                submit_btn=True,
                stop_btn=False,
            )
            self._note = gr.HTML('<div class="tm-note"></div>', container=False, padding=False, elem_id="tm-note")

    def _connect_events(self) -> None:
        settings = [self._system, *self._fields]
        updates = [self._chat, self._box, self._note]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self._box.submit(self._ask, [self._chat, self._box, *settings], updates, **quiet)
        self._chat.retry(self._retry, [self._chat, *settings], updates, **quiet)
        self._chat.edit(self._edit, [self._chat, *settings], updates, **quiet)
        self._chat.undo(self._undo, [self._chat], updates, **quiet)
        self._box.stop(self._stop, None, None, **quiet)
        self._new.click(self._clear, None, updates, **quiet)
        self._settings.click(None, js=look.SHOW_SETTINGS)
        self._theme.click(None, js=look.TOGGLE_THEME)
        gr.Timer(_STATUS_PERIOD_S).tick(self._status, None, [self._header], **quiet)
        self._chat.change(None, [self._chat], None, js=look.KEEP_CHAT)
        self.blocks.load(None, None, [self._chat], js=look.RESTORE_CHAT)
        self.blocks.load(None, js=look.RESTORE_THEME)
        self.blocks.load(self._status, None, [self._header], **quiet)
        self.blocks.unload(self._leave)

    async def _ask(
        self, chat: list[Shown], text: str, system: str, request: gr.Request, *texts: str
    ) -> AsyncGenerator[_Updates, None]:
        if not text.strip():
            return
        async for update in self._answer([*chat, chat_view.question(text)], system, texts, request):
            yield update

    async def _retry(
        self, chat: list[Shown], system: str, request: gr.Request, event: gr.RetryData, *texts: str
    ) -> AsyncGenerator[_Updates, None]:
        assert isinstance(event.index, int)
        last = chat_view.last_question(chat, event.index)
        if last is None:
            return
        async for update in self._answer(chat[: last + 1], system, texts, request, empties_box=False):
            yield update

    async def _edit(
        self, chat: list[Shown], system: str, request: gr.Request, event: gr.EditData, *texts: str
    ) -> AsyncGenerator[_Updates, None]:
        assert isinstance(event.index, int)
        asked = [*chat[: event.index], chat_view.question(str(event.value))]
        async for update in self._answer(asked, system, texts, request, empties_box=False):
            yield update

    async def _answer(
        self, chat: list[Shown], system: str, texts: tuple[str, ...], request: gr.Request, *, empties_box: bool = True
    ) -> AsyncGenerator[_Updates, None]:
        """Show the answer to a chat that ends with a question. A wrong option leaves everything as it is."""
        try:
            options = chat_view.options_of(dict(zip(OPTION_NAMES, texts, strict=True)))
        except InvalidRequestError as error:
            yield gr.skip(), gr.skip(), chat_view.problem(error)
            return
        session = self._sessions.get(_name(request))
        answer = session.ask(chat_view.model_messages(chat, system), options)
        yield [*chat, chat_view.PENDING], _box(is_busy=True, **({"value": ""} if empties_box else {})), ""
        seen = 0
        while not answer.is_done:
            await asyncio.sleep(_REFRESH_S)
            if session.answer is answer and len(answer.arrivals) > seen and answer.text:
                seen = len(answer.arrivals)
                yield [*chat, *chat_view.answer_view(answer)], gr.skip(), chat_view.note(answer)
        # Another question, or a new chat, may have the page by now.
        if session.answer is answer:
            yield [*chat, *chat_view.answer_view(answer)], _box(is_busy=False), chat_view.note(answer)

    async def _forget(self, request: gr.Request) -> None:
        """Give up what is running. Afterwards nothing of it comes to the page any more."""
        await asyncio.to_thread(self._sessions.get(_name(request)).forget)
        await asyncio.sleep(2 * _REFRESH_S)

    async def _undo(self, chat: list[Shown], request: gr.Request, event: gr.UndoData) -> _Updates:
        """The last question goes back into the box."""
        assert isinstance(event.index, int)
        await self._forget(request)
        last = chat_view.last_question(chat, event.index)
        if last is None:
            return gr.skip(), gr.skip(), gr.skip()
        return chat[:last], _box(is_busy=False, value=chat_view.text_of(chat[last])), ""

    async def _clear(self, request: gr.Request) -> _Updates:
        await self._forget(request)
        return [], _box(is_busy=False), ""

    def _stop(self, request: gr.Request) -> None:
        self._sessions.get(_name(request)).stop()

    def _status(self) -> str:
        return chat_view.header(self._watch.status())

    def _leave(self, request: gr.Request) -> None:
        self._sessions.drop(_name(request))


def _box(*, is_busy: bool, **changes: Any) -> gr.Textbox:
    """The box with the button that has a meaning now. What is typed in it stays, unless `changes` have a value."""
    return gr.Textbox(submit_btn=not is_busy, stop_btn=is_busy, **changes)


def _name(request: gr.Request) -> str:
    assert request.session_hash is not None
    return request.session_hash
