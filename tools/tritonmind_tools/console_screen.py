"""What a console shows and where its lines come from: a terminal, or plain streams without an escape code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

PROMPT = "> "
CONTINUATION = ". "
# Control characters but newline and tab: a model's text must not move the cursor or change colours.
_VISIBLE = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Screen:
    """A terminal when `interactive`; else answers go to `output` and the rest to `notes`, both without escape codes."""

    def __init__(self, lines: TextIO, output: TextIO, notes: TextIO, *, interactive: bool) -> None:
        from rich.console import Console

        self.interactive = interactive
        self._lines = lines
        self._output = output
        self._visible = _VISIBLE if output.isatty() else {}
        self._rich = Console(
            file=output if interactive else notes,
            force_terminal=None if interactive else False,
            no_color=None if interactive else True,
            highlight=False,
            soft_wrap=True,
        )
        self._at_line_start = True
        self._readline = False
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() arrow keys and a history

                self._readline = True

    @classmethod
    def standard(cls) -> Screen:
        """The process's own streams; a terminal when both directions are."""
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            # What the encoding lacks must not end the conversation.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        return cls(sys.stdin, sys.stdout, sys.stderr, interactive=sys.stdin.isatty() and sys.stdout.isatty())

    def read_line(self, *, first: bool) -> str | None:
        """The next line without its end, None at the end of the input or by Ctrl-C. first: it begins a question."""
        if not self.interactive:
            line = self._lines.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(self._coloured(PROMPT if first else CONTINUATION))
        except (EOFError, KeyboardInterrupt):
            self._output.write("\n")
            return None

    def write(self, text: str) -> None:
        """Show a piece of an answer at once."""
        if text:
            self._output.write(text.translate(self._visible))
            self._output.flush()
            self._at_line_start = text.endswith("\n")

    def end_answer(self) -> None:
        """End the line of an answer."""
        if not self._at_line_start:
            self._output.write("\n")
            self._output.flush()
            self._at_line_start = True

    def greet(self, text: str) -> None:
        """Say something that only somebody at a terminal needs."""
        if self.interactive:
            self.note(text)

    def note(self, text: str) -> None:
        """Say something about the conversation."""
        self._rich.print(text.translate(_VISIBLE), style="dim", markup=False)

    def error(self, text: str) -> None:
        """Say what went wrong."""
        self._rich.print(f"error: {text.translate(_VISIBLE)}", style="red", markup=False)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Two columns."""
        width = max(len(left) for left, _ in rows)
        for left, right in rows:
            self._rich.print(f"{left:<{width}}  ", style="cyan", markup=False, end="")
            self._rich.print(right, markup=False)

    def _coloured(self, prompt: str) -> str:
        # The \x01 and \x02 tell readline what takes no place on the line.
        if self._readline and self._rich.color_system and "NO_COLOR" not in os.environ:
            return f"\x01\x1b[36m\x02{prompt}\x01\x1b[0m\x02"
        return prompt
