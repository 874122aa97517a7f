"""Calls of tools in the text of an answer, found while it comes.

Models write a call as a JSON object with a name and arguments, between marks of their family. What looks like the
beginning of one is held back until that is decided, and no longer; arguments leave as they come.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from typing import Literal, NamedTuple

_NAME_KEYS = ("name",)
_ARGUMENT_KEYS = ("arguments", "parameters")


class Part(NamedTuple):
    """A piece of an answer. call: the number of the call that a "call", which names it, or "arguments" belong to."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    call: int = -1


class Format(NamedTuple):
    """How a family writes calls. opens: what comes before one. bare: an answer that begins with { may be one too."""

    opens: tuple[str, ...]
    closes: tuple[str, ...]
    bare: bool = False

    @property
    def has_special_tokens(self) -> bool:
        """Whether the marks may be special tokens of the vocabulary, which have no text unless that is asked for."""
        return any(mark.startswith("<|") for mark in self.opens)


FORMATS = {
    "hermes": Format(("<tool_call>",), ("</tool_call>",)),
    "llama3": Format(("<|python_tag|>",), ("<|eom_id|>", "<|eot_id|>", ";"), bare=True),
    "internlm2": Format(("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"), ("<|action_end|>",)),
}
# What an answer is that a grammar held to one call.
FORCED = Format((), (), bare=True)


class _CallScanner:
    """Reads one JSON object character by character: its name, and its arguments as they are written."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self.broken = False
        self._characters: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: str | None = None
        self._token_at = 0  # where the string or the value that is being read begins
        self._wants_value = self._in_value = False
        self._fragment = ""
        self.has_arguments = False

    @property
    def raw(self) -> str:
        """All that was read."""
        return "".join(self._characters)

    def take(self) -> str:
        """Arguments since the last time."""
        fragment, self._fragment = self._fragment, ""
        return fragment

    def push(self, character: str) -> None:
        self._characters.append(character)
        if self._in_string:
            self._push_in_string(character)
        elif self._depth == 0:
            self._open(character)
        elif self._depth == 1 and not self._in_value:
            self._push_between(character)
        else:
            self._push_in_value(character)

    def _open(self, character: str) -> None:
        if character == "{":
            self._depth = 1
        elif not character.isspace():
            self.broken = True

    def _push_between(self, character: str) -> None:
        """Between the members of the object."""
        if character.isspace() or (character == "," and not self._wants_value):
            return
        if character == "}":
            self._depth, self.done = 0, True
        elif not self._wants_value and character == '"':
            self._in_string, self._token_at = True, len(self._characters) - 1
        elif character == ":" and self._key is not None and not self._wants_value:
            self._wants_value = True
        elif self._wants_value:
            self._in_value, self._wants_value, self._token_at = True, False, len(self._characters) - 1
            self._push_in_value(character)
        else:
            self.broken = True

    def _push_in_string(self, character: str) -> None:
        self._add_argument(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self._depth == 1 and not self._in_value:
                self._key = self._loaded()
            elif self._depth == 1:
                self._end_value()

    def _push_in_value(self, character: str) -> None:
        if self._depth == 1 and character in ",}":  # after a number or a word
            self._end_value()
            self._push_between(character)
            return
        self._add_argument(character)
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1:
                self._end_value()

    def _add_argument(self, character: str) -> None:
        if self._in_value and self._key in _ARGUMENT_KEYS and self._characters[self._token_at] != '"':
            self._fragment += character

    def _end_value(self) -> None:
        if self._key in _NAME_KEYS:
            value = self._loaded()
            self.name = value if isinstance(value, str) else self.name
        elif self._key in _ARGUMENT_KEYS:
            self.has_arguments = True
            if self._characters[self._token_at] == '"':  # JSON within JSON
                self._fragment += self._loaded() or ""
        self._in_value, self._key = False, None

    def _loaded(self) -> str | None:
        try:
            value = json.loads("".join(self._characters[self._token_at :]).rstrip(",}"), strict=False)
        except ValueError:
            self.broken = True
            return None
        return value if isinstance(value, str) else None


class ToolCallParser:
    """Divides an answer into content and calls. names: of the tools; a call of another is content.

    max_calls: those after them are left out, None for any number.
    """

    def __init__(self, form: Format, names: Collection[str], *, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self._form = form
        self._names = names
        self._max_calls = max_calls
        self._pending = ""
        self._mark = ""  # what came before the call that is being read
        self._scanner: _CallScanner | None = None
        self._is_announced = False
        self._after_call = False
        self._at_start = True

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        self._pending += text
        while self._pending and self._step(parts, final=False):
            pass
        return _compact(parts)

    def finish(self) -> list[Part]:
        """What was held back, now that the answer has ended."""
        parts: list[Part] = []
        while self._pending and self._step(parts, final=True):
            pass
        if self._scanner is not None:
            self._leave_call(parts)
        return _compact(parts)

    def _step(self, parts: list[Part], *, final: bool) -> bool:
        """Use some of the pending text. False when more of it must come first."""
        if self._scanner is not None:
            self._read_call(parts)
            return True
        if self._after_call or self._at_start:
            stripped = self._pending.lstrip()
            if self._after_call:
                for mark in self._form.closes:
                    if stripped.startswith(mark):
                        self._pending = stripped[len(mark) :]
                        return True
                if not final and (not stripped or any(mark.startswith(stripped) for mark in self._form.closes)):
                    return False
            if self._form.bare and stripped.startswith("{"):
                self._begin_call(mark=self._pending[: -len(stripped)], rest=stripped)
                return True
            if not stripped and not final:
                return False
        return self._read_content(parts, final=final)

    def _read_content(self, parts: list[Part], *, final: bool) -> bool:
        found = [(at, -len(mark), mark) for mark in self._form.opens if (at := self._pending.find(mark)) >= 0]
        if found:
            at, _, mark = min(found)
            self._content(parts, self._pending[:at])
            self._begin_call(mark=mark, rest=self._pending[at + len(mark) :])
            return True
        held = 0 if final else max((_overlap(self._pending, mark) for mark in self._form.opens), default=0)
        self._content(parts, self._pending[: len(self._pending) - held])
        self._pending = self._pending[len(self._pending) - held :]
        return False

    def _content(self, parts: list[Part], text: str) -> None:
        if self._after_call and not text.strip():
            return  # space between calls
        if text:
            self._at_start = self._after_call = False
            parts.append(Part("content", text))

    def _begin_call(self, *, mark: str, rest: str) -> None:
        self._scanner, self._mark, self._pending = _CallScanner(), mark, rest
        self._is_announced = self._at_start = self._after_call = False

    def _read_call(self, parts: list[Part]) -> None:
        scanner = self._scanner
        assert scanner is not None
        for count, character in enumerate(self._pending, start=1):
            scanner.push(character)
            if scanner.done or scanner.broken:
                self._pending = self._pending[count:]
                self._tell(parts)
                self._leave_call(parts)
                return
        self._pending = ""
        self._tell(parts)

    def _tell(self, parts: list[Part]) -> None:
        """The call's name and arguments as far as they are known."""
        scanner = self._scanner
        assert scanner is not None
        if scanner.name not in self._names or self._is_surplus():
            return
        if not self._is_announced:
            self._is_announced = True
            self.num_calls += 1
            parts.append(Part("call", str(scanner.name), self.num_calls - 1))
        fragment = scanner.take()
        if fragment:
            parts.append(Part("arguments", fragment, self.num_calls - 1))

    def _is_surplus(self) -> bool:
        return not self._is_announced and self._max_calls is not None and self.num_calls >= self._max_calls

    def _leave_call(self, parts: list[Part]) -> None:
        scanner, self._scanner = self._scanner, None
        assert scanner is not None
        if self._is_announced:
            if scanner.done and not scanner.has_arguments:
                parts.append(Part("arguments", "{}", self.num_calls - 1))
            self._after_call = True
        elif self._is_surplus() and scanner.name in self._names:
            self._after_call = True
        else:
            parts.append(Part("content", self._mark + scanner.raw))


class ReasoningParser:
    """Divides an answer into what a model thinks, between <think> and </think>, and what it says.

    inside: the prompt has opened the thinking already.
    """

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self, *, inside: bool) -> None:
        self._state: Literal["start", "inside", "gap", "after"] = "inside" if inside else "start"
        self._pending = ""
        self._has_text = False

    def push(self, text: str) -> list[Part]:
        if self._state == "after":
            return [Part("content", text)] if text else []
        self._pending += text
        parts: list[Part] = []
        if self._state == "start":
            stripped = self._pending.lstrip()
            if stripped.startswith(self.OPEN):
                self._state, self._pending = "inside", stripped[len(self.OPEN) :]
            elif not self.OPEN.startswith(stripped):
                self._state = "after"
                parts.append(Part("content", self._pending))
                self._pending = ""
        if self._state == "inside":
            self._read_thoughts(parts)
        if self._state == "gap":
            stripped = self._pending.lstrip()
            self._pending = ""
            if stripped:
                self._state = "after"
                parts.append(Part("content", stripped))
        return parts

    def finish(self) -> list[Part]:
        pending, self._pending = self._pending, ""
        if not pending.strip():
            return []
        return [Part("reasoning" if self._state == "inside" else "content", pending)]

    def _read_thoughts(self, parts: list[Part]) -> None:
        thoughts, closed, rest = self._pending.partition(self.CLOSE)
        if closed:
            self._state, self._pending = "gap", rest
            thoughts = thoughts.rstrip()
        else:
            held = _overlap(thoughts, self.CLOSE)
            kept = thoughts[: len(thoughts) - held].rstrip()  # space before the end of it belongs to neither
            thoughts, self._pending = kept, self._pending[len(kept) :]
        if not self._has_text:
            thoughts = thoughts.lstrip()
        if thoughts:
            self._has_text = True
            parts.append(Part("reasoning", thoughts))


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of `text` that may begin `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)


def _compact(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    joined: list[Part] = []
    for part in parts:
        if joined and part.kind != "call" and joined[-1].kind == part.kind and joined[-1].call == part.call:
            joined[-1] = part._replace(text=joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined
