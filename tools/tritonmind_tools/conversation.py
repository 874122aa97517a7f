"""What was said in one conversation, as the model gets it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tritonmind_tools.console_transport import Message


class Turn(NamedTuple):
    """A question and what was answered, the answer perhaps cut short."""

    question: str
    answer: str


@dataclass
class Conversation:
    """unanswered: a question whose answer failed, or was given up before a word came; it is no part of `messages`."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    unanswered: str | None = None

    @property
    def messages(self) -> list[Message]:
        """The conversation as the model gets it."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages
