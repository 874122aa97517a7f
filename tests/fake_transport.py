"""A model for consoles that answers as it is told to, and the program that puts it into one.

What a question does: `slow` never ends by itself, `silent` never begins, `deaf` does not even hear of a cancel; `fail`,
`long` and `lost` raise; anything else is said back.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from tritonmind.errors import InvalidRequestError, UnavailableError
from tritonmind_tools import console
from tritonmind_tools.console_transport import Delta, Message, Status

ERRORS = {
    "fail": InvalidRequestError("top_p", 2.0, "must be above 0 and at most 1"),
    "long": InvalidRequestError("prompt", "600 tokens", "session_len is 512 and the answer needs at least one"),
    "lost": UnavailableError("the connection is lost ([Errno 111] *refused*)"),
}


class FakeTransport:
    title = "a fake"

    def __init__(self) -> None:
        self.seen: list[list[Message]] = []
        self.options: list[dict[str, Any]] = []
        self.is_closed = False
        self._cancelled = threading.Event()

    def stream(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Generator[Delta, None, None]:
        self.seen.append(list(messages))
        self.options.append(dict(options))
        self._cancelled.clear()
        question = messages[-1]["content"]
        if question in ERRORS:
            yield Delta(text="begun ", num_tokens=1)
            raise ERRORS[question]
        if question == "deaf":
            yield Delta(text="begun ", num_tokens=1)
            threading.Event().wait()
        number = 0
        while question in ("slow", "silent"):
            yield Delta(text=f"word{number} " if question == "slow" else "", num_tokens=1, num_input_tokens=9)
            if self._cancelled.wait(0.02):
                yield Delta(finish_reason="cancelled")
                return
            number += 1
        counts = {"num_input_tokens": 7 * len(messages), "num_cached_tokens": 7 * (len(messages) - 1)}
        yield Delta(text="said: ", num_tokens=2, **counts)
        yield Delta(text=question, num_tokens=3, finish_reason="stop", **counts)

    def connect(self) -> FakeTransport:
        return self

    def status(self) -> Status:
        return Status(is_ready=not self.is_closed, text=self.title)

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self.is_closed = True


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    console.add_arguments(parser)
    return console.converse(FakeTransport, parser.parse_args(argv), opening="waking a fake")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
