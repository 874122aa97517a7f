"""A program in a pseudo-terminal: type, wait for what it shows, and see the whole screen where a test fails."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent
CTRL_D = "\x04"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
_ROWS, _COLUMNS = 40, 120


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child that imports the package and the tests from this checkout."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("backend", "tools", "."))
    return {**os.environ, "PYTHONPATH": paths, "TERM": "xterm", "PYTHONUNBUFFERED": "1", **changes}


class Terminal:
    """A command whose controlling terminal we hold the other end of. A context manager; leaving it kills the command.

    raw: all that was shown. screen: the same as plain text.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> None:
        self._timeout = timeout
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=dict(env or environment()),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.raw = ""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._master)

    @property
    def screen(self) -> str:
        return _ESCAPES.sub("", self.raw).replace("\r", "")

    def type(self, text: str) -> None:
        """Type `text`; a newline is the Enter key."""
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Type Ctrl-C, as late as a person would: a signal between a prompt and its read waits for the next key."""
        time.sleep(0.2)
        self.type("\x03")

    def expect(self, pattern: str) -> str:
        """Wait until `pattern` comes after what earlier calls found. Returns the text up to its end."""
        deadline = time.monotonic() + self._timeout
        while True:
            found = re.compile(pattern, re.M).search(self.screen, self._seen)
            if found is not None:
                text = self.screen[self._seen : found.end()]
                self._seen = found.end()
                return text
            assert self._read(deadline), f"{pattern!r} did not come. The screen:\n{self.screen}"

    def wait(self) -> int:
        """Wait until the command ends. Returns its exit code."""
        deadline = time.monotonic() + self._timeout
        while self._read(deadline):
            pass
        assert time.monotonic() < deadline, f"the command did not end. The screen:\n{self.screen}"
        return self.process.wait()

    def _read(self, deadline: float) -> bool:
        """Take what the command shows next; False when it has ended or the time is over."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        try:
            data = os.read(self._master, 65536) if ready else b""
        except OSError:  # the other end is closed
            data = b""
        self.raw += data.decode(errors="replace")
        return bool(data)
