"""One request between its acceptance and its last response, and what it needs of a front end."""

from __future__ import annotations

import logging
import queue
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tritonmind.errors import TritonmindError
from tritonmind.messages import FinishReason, TokenOutput
from tritonmind.request_fields import ParsedRequest
from tritonmind.text_stream import TextStream

if TYPE_CHECKING:
    from tritonmind.engine.client import EngineClient

log = logging.getLogger("tritonmind")


@dataclass(kw_only=True)
class Answer:
    """What one response says. Text, ids and num_output_tokens are those since the previous response."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_output_tokens: int = 0
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None


class Responder(Protocol):
    """The way back to one client. `is_cancelled` may be called by another thread than the rest, at any time."""

    def send(self, answer: Answer, *, final: bool) -> None: ...

    def fail(self, error: TritonmindError) -> None:
        """Send an error as the last response."""

    def finish(self) -> None:
        """End the request without a response, for when neither an answer nor an error can be sent."""

    def is_cancelled(self) -> bool: ...


class LiveRequest:
    """A request's state. `failure` and `rung` may be written by any thread, `client` and `stream` by the intake thread
    before the engine knows the request, `sweep_failed` by the sweeper, the rest by its lane.
    """

    def __init__(self, request: ParsedRequest, responder: Responder, lane: Lane) -> None:
        self.request = request
        self.responder = responder
        self.lane = lane
        self.inbox: deque[TokenOutput] = deque()
        self.rung = False
        self.failure: TritonmindError | None = None
        self.closed = False
        self.sweep_failed = False
        self.client: EngineClient | None = None
        self.engine_id = -1
        self.stream: TextStream | None = None
        self.answer = Answer()

    def ring(self) -> None:
        """Have the lane look at this request; once is enough until it does."""
        if not self.rung:
            self.rung = True
            self.lane.put(self)

    def give_up(self, error: TritonmindError) -> None:
        """End the request with `error` unless it ended before. The first error counts."""
        if self.failure is None:
            self.failure = error
        self.abort()
        self.ring()

    def abort(self) -> None:
        """Tell the engine to drop the request. An engine that cannot be told is about to be found dead."""
        if self.client is not None:
            try:
                self.client.abort([self.engine_id])
            except Exception:
                log.exception("a request could not be aborted in the engine")

    def on_output(self, output: TokenOutput) -> None:
        self.inbox.append(output)
        self.ring()


# A sender thread's queue of requests to look at; None ends the thread.
Lane = queue.SimpleQueue[LiveRequest | None]
