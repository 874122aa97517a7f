"""One request between its acceptance and its last response, and what it needs of a front end."""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tritonmind.errors import TritonmindError
from tritonmind.messages import FinishReason, TokenOutput
from tritonmind.metrics import RequestTimes
from tritonmind.request_fields import ParsedRequest
from tritonmind.sessions import Turn
from tritonmind.text_stream import TextStream

if TYPE_CHECKING:
    from tritonmind.engine.client import EngineClient

log = logging.getLogger("tritonmind")


@dataclass(kw_only=True)
class Answer:
    """What one response says. Text, ids, num_output_tokens and logprobs are those since the previous response.

    logprobs: for each id the likeliest tokens and the drawn one, by id. cumulative_logprob: of the answer so far.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_output_tokens: int = 0
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    logprobs: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None  # in one response

    def rest(self) -> Answer:
        """What there is to say when this has been sent: nothing new yet, and what holds for good."""
        return Answer(
            num_input_tokens=self.num_input_tokens,
            num_cached_tokens=self.num_cached_tokens,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=self.cumulative_logprob,
        )


@dataclass
class Choice:
    """One of the n answers that a request gets. An order has one without a stream. engine_id: its request's there."""

    engine_id: int = -1
    stream: TextStream | None = None
    answer: Answer = field(default_factory=Answer)


class Responder(Protocol):
    """The way back to one client. `is_cancelled` may be called by another thread than the rest, at any time."""

    def send(self, answers: list[Answer], *, final: bool) -> None:
        """Send a response about all n answers."""

    def fail(self, error: TritonmindError) -> None:
        """Send an error as the last response."""

    def finish(self) -> None:
        """End the request without a response, for when neither an answer nor an error can be sent."""

    def is_cancelled(self) -> bool: ...


class LiveRequest:
    """A request's state. Who writes it: any thread `failure`, `interrupted` and `rung`; under the server's lock
    `followers` and `num_awaited`; the intake thread, before the engine knows the request, `client` and what describes
    the prompt; the engine client's receive thread the times of tokens; the sweeper `sweep_failed`; its lane the rest.

    turn: the request's turn of its session, until the session is free again.
    followers: orders to end this request, answered when it has ended. num_awaited: how many requests an order awaits.
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
        self.choices = [Choice()]
        self.arrived_at = time.monotonic()
        timeout_ms = request.timeout_ms
        self.deadline = None if timeout_ms is None else self.arrived_at + timeout_ms / 1000
        self.interrupted = False
        self.followers: list[LiveRequest] = []
        self.num_awaited = 0
        self.turn: Turn | None = None
        self.prompt_token_ids: list[int] = []
        self.answer_token_ids: list[int] = []  # kept for the session only
        self.ended_by_token = False
        self.submitted_at = self.arrived_at
        self.queue_time: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at = self.arrived_at
        self.num_tokens = 0

    @property
    def answer(self) -> Answer:
        """The first answer, for what all of them share."""
        return self.choices[0].answer

    def choice(self, engine_id: int) -> Choice:
        """The one whose request in the engine has this id; they are numbered in a row."""
        return self.choices[engine_id - self.choices[0].engine_id]

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

    def interrupt(self) -> None:
        """End the request with the answer that it has so far."""
        self.interrupted = True
        self.abort()

    def abort(self) -> None:
        """Tell the engine to drop the request. An engine that cannot be told is about to be found dead."""
        self.abort_choices(self.choices)

    def abort_choices(self, choices: list[Choice]) -> None:
        """Tell the engine that these answers need no more tokens."""
        if self.client is not None:
            try:
                self.client.abort([choice.engine_id for choice in choices])
            except Exception:
                log.exception("a request could not be aborted in the engine")

    def on_output(self, output: TokenOutput) -> None:
        if output.token_ids:
            self.last_token_at = time.monotonic()
            if self.first_token_at is None:
                self.first_token_at = self.last_token_at
                self.queue_time = self.submitted_at - self.arrived_at + (output.queue_time_s or 0)
            self.num_tokens += len(output.token_ids)
        self.inbox.append(output)
        self.ring()

    def times(self, *, complete: bool) -> RequestTimes:
        """How long it took, now that it has ended. complete: with a whole answer."""
        first = self.first_token_at
        num_steps = self.num_tokens // len(self.choices)
        return RequestTimes(
            queue_time=self.queue_time,
            time_to_first_token=None if first is None else first - self.arrived_at,
            inter_token_latency=(
                None if first is None or num_steps < 2 else (self.last_token_at - first) / (num_steps - 1)
            ),
            request_duration=time.monotonic() - self.arrived_at if complete else None,
        )


# A sender thread's queue of requests to look at; None ends the thread.
Lane = queue.SimpleQueue[LiveRequest | None]
