"""Conversations of many browsers with one source. Needs no Gradio.

An answer is read by a thread of its own, so that it ends when it is told to, whether or not anybody still looks at it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tritonmind.errors import TritonmindError
from tritonmind_tools.console_transport import Delta, Message, Source, Status, Transport, finish_reason

STATUS_AGE_S = 2.0
# Seconds after which an answer that waits for its turn looks whether it is still wanted.
_WAIT_S = 0.1


class Answer:
    """One answer as it comes. Everything may be read from other threads while it grows."""

    def __init__(self, session: Session, messages: Sequence[Message], options: Mapping[str, Any]) -> None:
        self.arrivals: list[tuple[float, Delta]] = []
        self.error: TritonmindError | None = None
        self._session = session
        self._before = session.answer
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, args=(messages, options), name="answer", daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        return "".join(delta.text for _, delta in list(self.arrivals))

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def was_stopped(self) -> bool:
        return self.is_done and self.error is None and finish_reason(self.arrivals) == "cancelled"

    def stop(self) -> None:
        """Give it up; it is done soon after."""
        self._is_stopped = True
        self._session.cancel()

    def wait(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def _run(self, messages: Sequence[Message], options: Mapping[str, Any]) -> None:
        before, self._before = self._before, None
        if before is not None:
            before.stop()
            before.wait()
        while not self._session.places.acquire(timeout=_WAIT_S):
            if self._is_stopped:
                return
        try:
            transport = self._session.connect()
            begin = time.monotonic()
            with contextlib.closing(transport.stream(messages, options)) as deltas:
                for delta in deltas:
                    self.arrivals.append((time.monotonic() - begin, delta))
                    if self._is_stopped:
                        return
        except TritonmindError as error:
            self.error = error
        except Exception as error:
            self.error = TritonmindError(f"internal error: {type(error).__name__}: {error}")
            raise
        finally:
            self._session.places.release()


class Session:
    """What one browser talks to. It connects with its first question, and again when the server was lost.

    places: taken by each running answer of any session; the others wait.
    """

    def __init__(self, source: Source, places: threading.Semaphore) -> None:
        self.answer: Answer | None = None
        self.places = places
        self._source = source
        self._transport: Transport | None = None

    def ask(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Answer:
        """Begin an answer. One that is still running is given up first."""
        self.answer = Answer(self, messages, options)
        return self.answer

    def stop(self) -> None:
        """Give the running answer up, if there is one."""
        if self.answer is not None:
            self.answer.stop()

    def forget(self) -> None:
        """Give the running answer up, and wait until it has ended: nobody wants to see any more of it."""
        answer, self.answer = self.answer, None
        if answer is not None:
            answer.stop()
            answer.wait(timeout=5.0)

    def close(self) -> None:
        """Give everything up."""
        self.forget()
        if self._transport is not None:
            self._transport.close()

    def connect(self) -> Transport:
        """The way to the model, made by the first call."""
        if self._transport is None:
            self._transport = self._source.connect()
        return self._transport

    def cancel(self) -> None:
        """End the transport's running answer."""
        if self._transport is not None:
            self._transport.cancel()


class Sessions:
    """The sessions of all browsers, by the name that Gradio gives each page. Thread-safe."""

    def __init__(self, source: Source, *, num_answers: int) -> None:
        """num_answers: how many may run at once, over all of them."""
        self._source = source
        self._places = threading.Semaphore(num_answers)
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, name: str) -> Session:
        """The session of a page; a new one for a page that is new, or that was away for a while."""
        with self._lock:
            return self._sessions.setdefault(name, Session(self._source, self._places))

    def drop(self, name: str) -> None:
        """End the session of a page that is gone."""
        with self._lock:
            session = self._sessions.pop(name, None)
        if session is not None:
            session.close()

    def close(self) -> None:
        for name in list(self._sessions):
            self.drop(name)


class Watch:
    """The source's status for any number of pages that ask for it all the time: it is looked up once for all."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._status = source.status()
        self._time = time.monotonic()

    def status(self) -> Status:
        """At most about STATUS_AGE_S old; older while a lost server keeps somebody else waiting."""
        if time.monotonic() - self._time > STATUS_AGE_S and self._lock.acquire(blocking=False):
            try:
                self._status = self._source.status()
                self._time = time.monotonic()
            finally:
                self._lock.release()
        return self._status
