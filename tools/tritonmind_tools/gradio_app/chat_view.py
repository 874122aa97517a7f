"""What the chat shows, and what the model gets of it. Needs no Gradio.

The shown messages are the only history there is: a page that was away for a while goes on where it was.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tritonmind.errors import InvalidRequestError
from tritonmind.sampling_params import SamplingParams
from tritonmind_tools.console_options import parse_option
from tritonmind_tools.console_transport import Message, Status, figures, finish_reason, is_too_long
from tritonmind_tools.gradio_app.session import Answer

Shown = dict[str, Any]  # a message of Gradio's Chatbot

# The id of an answer that failed, and with its question is no part of what the model gets.
FAILED = "failed"
# What stands there until the first word; if it stays, there was no answer.
PENDING: Shown = {"role": "assistant", "content": "…", "metadata": {"id": FAILED}}


def model_messages(chat: Sequence[Shown], system: str) -> list[Message]:
    """The conversation as the model gets it: no reasoning, and no question whose answer failed or is empty.

    The last question may have no answer yet.
    """
    messages = [{"role": "system", "content": system}] if system.strip() else []
    rest = list(chat)
    while rest:
        question, *rest = rest
        answers = []
        while rest and rest[0]["role"] == "assistant":
            answers.append(rest.pop(0))
        text = "".join(text_of(answer) for answer in answers if not _metadata(answer).get("title"))
        has_failed = any(_metadata(answer).get("id") == FAILED for answer in answers)
        if not answers and not rest:
            messages.append({"role": "user", "content": text_of(question)})
        elif text.strip() and not has_failed:
            messages += [{"role": "user", "content": text_of(question)}, {"role": "assistant", "content": text}]
    return messages


def question(text: str) -> Shown:
    return {"role": "user", "content": text}


def answer_view(answer: Answer) -> list[Shown]:
    """The answer as far as it has come, and what went wrong with it."""
    text = answer.text
    if answer.error is not None:
        return [_failed(text, f"**No answer.** {_plain(_with_remedy(answer.error))}")]
    if answer.was_stopped and not text.strip():
        return [_failed("", "*Stopped before the first word.*")]
    return [{"role": "assistant", "content": text}]


def text_of(message: Shown) -> str:
    """The text of a message as the page sends it back: a text, or a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


def last_question(chat: Sequence[Shown], before: int | None = None) -> int | None:
    """The index of the last question at or before one of the messages."""
    end = len(chat) if before is None else before + 1
    return next((index for index in range(end - 1, -1, -1) if chat[index]["role"] == "user"), None)


def options_of(texts: Mapping[str, str]) -> dict[str, Any]:
    """The sampling options that were typed; empty ones are left to the model. Raises InvalidRequestError."""
    options = {name: parse_option(name, text.strip()) for name, text in texts.items() if text.strip()}
    SamplingParams(**options)
    return options


def note(answer: Answer) -> str:
    """The line below an answer: its figures, and why it ended."""
    parts = figures(answer.arrivals) if answer.error is None else ["failed"]
    if answer.is_done and answer.error is None:
        parts.append(finish_reason(answer.arrivals))
    return f'<div class="tm-note">{" · ".join(map(html.escape, parts))}</div>'


def problem(error: Exception) -> str:
    """The line below the chat for something that the user can mend before anything is asked."""
    return f'<div class="tm-note tm-problem" role="alert">{html.escape(_sentence(error))}</div>'


def header(status: Status) -> str:
    """The name, and how the server is."""
    state = "ready" if status.is_ready else "lost"
    text = html.escape(status.text)
    return (
        '<div class="tm-header"><span class="tm-name">tritonmind</span>'
        f'<span class="tm-status tm-{state}" role="status" title="{text}"><i></i><span>{text}</span></span></div>'
    )


def _failed(text: str, reason: str) -> Shown:
    content = f"{text}\n\n{reason}" if text.strip() else reason
    return {"role": "assistant", "content": content, "metadata": {"id": FAILED}}


def _metadata(message: Shown) -> dict[str, Any]:
    return message.get("metadata") or {}


def _with_remedy(error: Exception) -> str:
    if is_too_long(error):
        return f"{_sentence(error)} The conversation before it counts: edit a question further up, or begin a new chat."
    if isinstance(error, InvalidRequestError):
        return _sentence(error)
    return f"{_sentence(error)} Try again with the arrow below."


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _plain(text: str) -> str:
    """Text whose characters mean nothing to Markdown, nor to formulas, whose marks are \\( and \\[."""
    return "".join(f"&#{ord(character)};" if character in "\\`*_[]<>&#!|~$" else character for character in text)
