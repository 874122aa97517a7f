"""model.py when the server's own calls and the engine's client fail: no thread ends, requests still do."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.backend.conftest import Served, error_of, eventually, texts
from tritonmind.errors import TritonmindError
from tritonmind.live_request import Answer
from tritonmind.request_fields import ParsedRequest


def failing(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """`function`, raising the first `times` times."""
    failures = [RuntimeError("no shared memory")] * times

    def call(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return function(*args, **kwargs)

    return call


def test_is_cancelled_that_raises_does_not_end_the_sweeper(served: Served) -> None:
    sender, other = (served.send(text_input="a") for _ in range(2))
    served.engine.wait_for(2)
    asked = []
    is_cancelled = failing(sender.is_cancelled, times=1)

    def counted() -> bool:
        asked.append(None)
        return bool(is_cancelled())

    sender.is_cancelled = counted
    assert eventually(lambda: len(asked) > 1), "the request was not asked about again"
    for request in (other, sender):
        request.cancelled = True
        assert error_of(request).code() == served.pb_utils.TritonError.CANCELLED


def test_watching_that_raises_does_not_end_the_sweeper(
    unloaded: Served, adapter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "_should_drain", failing(lambda: False, times=3))
    unloaded.load({"drain_timeout_s": "0.2"})
    engine = unloaded.engine
    monkeypatch.setattr(engine, "is_alive", failing(engine.is_alive, times=3))
    monkeypatch.setattr(engine, "shutdown", failing(engine.shutdown, times=1))
    sender = unloaded.send(text_input="a")
    engine.wait_for(1)
    sender.cancelled = True
    assert error_of(sender).code() == unloaded.pb_utils.TritonError.CANCELLED
    engine.die()
    assert eventually(lambda: len(unloaded.engines) == 2 and unloaded.model.is_ready())
    engine.was_shut_down = True  # it was tried


def test_abort_that_raises_does_not_keep_the_request(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = served.send(text_input="a")
    served.engine.wait_for(1)
    monkeypatch.setattr(served.engine, "abort", failing(served.engine.abort, times=1))
    sender.cancelled = True
    assert error_of(sender).code() == served.pb_utils.TritonError.CANCELLED


@pytest.mark.parametrize("times", [2, 3, 4])
def test_a_request_whose_error_cannot_be_sent_is_still_ended(served: Served, times: int) -> None:
    """The first failure is the answer's, the second its error's, the rest those of the bare FINAL."""
    sender = served.send(text_input="a")
    request = served.engine.wait_for(1)
    sender.send = failing(sender.send, times)
    served.engine.output(request.request_id, served.ids("b"), "length")
    assert sender.final.wait(30)
    assert sender.responses == []
    other = served.send(text_input="a")
    request = served.engine.wait_for(2)
    served.engine.output(request.request_id, served.ids("c"), "length")
    assert other.final.wait(30)
    assert texts(other) == ["c"]


class _Gone:
    """A responder whose client cannot be reached at all."""

    def __init__(self) -> None:
        self.num_attempts = 0

    def send(self, answer: Answer, *, final: bool) -> None:
        raise RuntimeError("gone")

    def fail(self, error: TritonmindError) -> None:
        raise RuntimeError("gone")

    def finish(self) -> None:
        self.num_attempts += 1
        raise RuntimeError("gone")

    def is_cancelled(self) -> bool:
        return False


def test_only_finals_that_were_sent_are_counted(served: Served) -> None:
    server = served.model._server
    responder = _Gone()
    server.accept(ParsedRequest(text="a"), responder)
    request = served.engine.wait_for(1)
    served.engine.output(request.request_id, served.ids("b"), "length")
    served.model.finalize()
    assert responder.num_attempts == 3
    assert (server.num_accepted, server.num_finals) == (1, 0)
    del served.model._server  # the fixture would find the accounts uneven, as they are


def test_a_session_is_free_again_after_a_broken_answer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the lane would be dead, or the session busy, for ever."""
    session = {"session_id": np.array([1], dtype=np.uint64)}
    sender = served.send(text_input="a", sequence_start=True, **session)
    request = served.engine.wait_for(1)
    server = served.model._server
    (live,) = server._live
    stream = live.choices[0].stream
    monkeypatch.setattr(stream, "push", failing(stream.push, times=9))
    served.engine.output(request.request_id, [9])
    served.engine.output(request.request_id, [9])
    assert error_of(sender).code() == served.pb_utils.TritonError.INTERNAL
    next_turn = served.send(text_input="b", **session)
    request = served.engine.wait_for(2)
    served.engine.output(request.request_id, served.ids("c"), "length")
    assert next_turn.final.wait(30)
    assert texts(next_turn) == ["c"]
