"""Between a front end and the engine: each accepted request is answered, and ended exactly once, whatever happens.

Threads and their order of effects. `accept` registers a request and returns. An intake thread tokenises and submits
it. The engine client's receive thread only appends token outputs to the request's inbox and rings its lane. A lane
(one of a few threads in `senders`; a request stays on its own) drains the inbox, turns everything pending into one
response and sends it. The sweeper polls for cancellation, deadlines and the engine's life. Whoever gives a request up
records the failure first, then aborts it in the engine, then rings its lane: only the lane ever sends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from tritonmind.chat_template import ChatTemplate
from tritonmind.config import ModelConfig
from tritonmind.errors import CancelledError, DeadlineError, NotFoundError, TritonmindError, UnavailableError
from tritonmind.grammars import GrammarCompiler
from tritonmind.live_request import Answer, Choice, LiveRequest, Responder
from tritonmind.metrics import Metrics
from tritonmind.prompts import PromptBuilder
from tritonmind.request_fields import ParsedRequest
from tritonmind.sampling_params import GenerationDefaults, resolve, siblings
from tritonmind.senders import NUM_LANES, Senders
from tritonmind.sessions import SessionStore
from tritonmind.supervisor import EngineFailurePolicy, EngineSupervisor
from tritonmind.text_stream import text_stream
from tritonmind.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tritonmind.engine.client import EngineClient

DEFAULT_DRAIN_TIMEOUT_S = 5.0
DEFAULT_PRIORITY = 100
NUM_INTAKE_THREADS = 2
SWEEP_PERIOD_S = 0.05
MAX_ASKED_PER_SWEEP = 64  # asking the server whether a request is cancelled is a round trip, as a response is
METRICS_PERIOD_S = 0.25
SWEEP_COMPLAINT_PERIOD_S = 60.0

log = logging.getLogger("tritonmind")


class RequestServer:
    """Answers requests with an engine that it starts, watches and, when it fails, replaces.

    start: makes an engine; blocks until it is ready. What it raises at first leaves the constructor; later it is tried
    again. on_engine_exit: called once after an engine failure instead of a restart, when the policy is "exit".
    should_drain: polled; once it is true the server drains for drain_timeout seconds and takes no more requests.
    default_priority: of requests that name none. num_lanes: threads that make answers.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        defaults: GenerationDefaults,
        model: ModelConfig,
        start: Callable[[], EngineClient],
        sessions: SessionStore,
        metrics: Metrics,
        default_priority: int,
        engine_failure: EngineFailurePolicy = "restart",
        on_engine_exit: Callable[[], None] = lambda: None,
        should_drain: Callable[[], bool] = lambda: False,
        drain_timeout: float,
        num_lanes: int = NUM_LANES,
    ) -> None:
        self.num_accepted = 0
        self.num_finals = 0
        self._tokenizer = tokenizer
        self._prompts = PromptBuilder(tokenizer, chat_template)
        self._grammars = GrammarCompiler(tokenizer, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
        self._defaults = defaults
        self._model = model
        self._sessions = sessions
        self._metrics = metrics
        self._default_priority = default_priority
        self._should_drain = should_drain
        self._drain_timeout = drain_timeout
        self._lock = threading.Lock()
        self._all_ended = threading.Condition(self._lock)
        self._live: dict[LiveRequest, None] = {}
        self._refusal: UnavailableError | None = None
        self._stopping = threading.Event()
        self._next_complaint = 0.0
        self._num_asked = 0
        self._engine = EngineSupervisor(start, engine_failure, on_engine_exit, self._stopping)
        self._intake = ThreadPoolExecutor(NUM_INTAKE_THREADS, thread_name_prefix="intake")
        self._senders = Senders(tokenizer, sessions, metrics, self._ended, num_lanes)
        self._sweeper = threading.Thread(target=self._run_sweeper, name="sweeper", daemon=True)
        self._metrics_writer = threading.Thread(target=self._run_metrics, name="metrics", daemon=True)
        self._sweeper.start()
        self._metrics_writer.start()

    def accept(self, request: ParsedRequest, responder: Responder) -> LiveRequest:
        """Answer `request` through `responder`. Returns at once; every failure becomes a response.

        The result is for giving the request up.
        """
        live = self._register(request, responder)
        if self._refusal is not None:
            live.give_up(self._refusal)
            return live
        try:
            if request.is_order:
                self._obey(live)
                return live
            if request.session is not None:
                live.turn = self._sessions.begin(request.session)
            if request.params.guided is None:
                self._take_in(live)
            else:  # no intake thread waits for its compilation
                self._grammars.guide(request.params.guided).add_done_callback(lambda _: self._take_in(live))
        except TritonmindError as error:
            live.give_up(error)
        return live

    def _take_in(self, live: LiveRequest) -> None:
        try:
            self._intake.submit(self._submit, live)
        except RuntimeError:  # the pool was shut down between the check and now
            live.give_up(UnavailableError("the model is being unloaded"))

    def refuse(self, responder: Responder, error: TritonmindError) -> None:
        """Answer a request that cannot be accepted."""
        self._register(ParsedRequest(), responder).give_up(error)

    def is_ready(self) -> bool:
        """Whether requests can be answered now. Reads flags only."""
        client = self._engine.client
        return client is not None and self._refusal is None and client.is_alive()

    def drain(self) -> None:
        """Refuse new requests, let the live ones end for drain_timeout seconds, then end them with UNAVAILABLE."""
        timeout = self._drain_timeout
        self._refusal = UnavailableError("the model is being unloaded and takes no more requests")
        with self._all_ended:
            self._all_ended.wait_for(lambda: not self._live, timeout)
            remaining = list(self._live)
        for live in remaining:
            live.give_up(UnavailableError(f"the model is being unloaded: the answer was cut off after {timeout:g} s"))

    def close(self) -> None:
        """Drain, stop every thread and the engine, and log the accounts.

        Takes the drain timeout, what is left of tokenising at most NUM_INTAKE_THREADS prompts (`prompts` bounds
        those), and for the engine a few times supervisor.ENGINE_STOP_TIMEOUT_S.
        """
        self.drain()
        self._stopping.set()
        self._sweeper.join()
        self._metrics_writer.join()
        self._grammars.close()
        self._intake.shutdown(wait=True, cancel_futures=True)
        self._senders.close()
        log.info("requests accepted: %d, final responses sent: %d", self.num_accepted, self.num_finals)
        self._metrics.close()
        self._engine.close()

    def _register(self, request: ParsedRequest, responder: Responder) -> LiveRequest:
        with self._lock:
            live = LiveRequest(request, responder, self._senders.lane(self.num_accepted))
            self.num_accepted += 1
            self._live[live] = None
        return live

    def _ended(self, live: LiveRequest, sent: bool) -> None:
        """Lane thread: a request has had its last response, if it could be sent."""
        with self._all_ended:
            del self._live[live]
            self.num_finals += sent
            for follower in live.followers:
                follower.num_awaited -= 1
                if not follower.num_awaited:
                    follower.ring()
            self._all_ended.notify_all()

    def _obey(self, live: LiveRequest) -> None:
        """Act on an order, which is answered, saying what it did, after the requests that it ends."""
        session, request_id = live.request.session, live.request.request_id
        targets: list[LiveRequest] = []
        if session is None:
            live.choices[0].answer = Answer(finish_reason="stop", stop_reason=f"request {request_id[:80]!r}: cancelled")
            targets = self._await(live, lambda other: other.request.request_id == request_id)
            if not targets:
                raise NotFoundError(f"no live request has the id {request_id[:80]!r}")
        elif session.stop:
            turn = self._sessions.stop(session.session_id, forget=session.end)
            live.choices[0].answer = Answer(
                finish_reason="stop", stop_reason=f"session {session.session_id}: interrupted"
            )
            targets = self._await(live, lambda other: turn is not None and other.turn is turn)
            if not targets:
                live.answer.stop_reason = f"session {session.session_id}: nothing was running"
        else:
            self._sessions.forget(session.session_id)
            live.choices[0].answer = Answer(
                finish_reason="stop", stop_reason=f"session {session.session_id}: forgotten"
            )
        for target in targets:
            target.interrupt()
        if not targets:
            live.ring()

    def _await(self, order: LiveRequest, wanted: Callable[[LiveRequest], bool]) -> list[LiveRequest]:
        """The live requests that an order is about. The order is answered when the last of them ends."""
        with self._lock:
            targets = [live for live in self._live if not live.request.is_order and wanted(live)]
            order.num_awaited = len(targets)
            for live in targets:
                live.followers.append(order)
        return targets

    def _submit(self, live: LiveRequest) -> None:
        """Intake thread: text to token ids to the engine."""
        try:
            if live.failure is not None:
                return
            client = self._engine.require()
            token_ids, text = self._prompts.build(live.request, live.turn, client.info.max_model_len)
            params = live.request.params
            first = resolve(
                params,
                self._defaults,
                request_id=client.next_request_id(params.n),
                prompt_token_ids=token_ids,
                vocab_size=self._model.vocab_size,
                max_model_len=client.info.max_model_len,
                eos_token_ids=self._model.eos_token_ids,
                encode_word=self._tokenizer.encode_word,
                check_guided=self._grammars.check,
            )
            first = msgspec.structs.replace(first, priority=live.request.priority or self._default_priority)
            live.prompt_token_ids = token_ids
            echo = text if live.request.echo else ""
            requests = siblings(first, params.n)
            stream = text_stream(self._tokenizer, params, continues=live.request.messages is None)
            live.choices = [
                Choice(
                    request.request_id,
                    stream.sibling(),
                    Answer(text=echo, num_input_tokens=len(token_ids)),
                )
                for request in requests
            ]
            live.client = client
            live.submitted_at = time.monotonic()
            client.submit_all(requests, live.on_output)
            # Given up before the engine knew it: that abort came too early.
            if live.failure is not None or live.interrupted:
                live.abort()
        except TritonmindError as error:
            live.give_up(error)
        except Exception as error:
            log.exception("a request failed before it reached the engine")
            live.give_up(TritonmindError(f"internal error: {error!r}"))

    def _run_sweeper(self) -> None:
        while not self._stopping.wait(SWEEP_PERIOD_S):
            for watch in (self._engine.watch, self._watch_drain, self._watch_deadlines):
                try:
                    watch()
                except Exception:
                    # Likely again at every sweep.
                    if time.monotonic() >= self._next_complaint:
                        self._next_complaint = time.monotonic() + SWEEP_COMPLAINT_PERIOD_S
                        log.exception("the engine or the order to drain could not be looked at; tried again")
            for live in self._next_asked():
                self._watch_client(live)

    def _next_asked(self) -> list[LiveRequest]:
        """Live requests, a limited number, beginning where the sweep before ended."""
        with self._lock:
            lives = list(self._live)
        if len(lives) <= MAX_ASKED_PER_SWEEP:
            return lives
        begin = self._num_asked % len(lives)
        self._num_asked += MAX_ASKED_PER_SWEEP
        return [*lives[begin:], *lives[:begin]][:MAX_ASKED_PER_SWEEP]

    def _watch_client(self, live: LiveRequest) -> None:
        try:
            if live.failure is None and live.responder.is_cancelled():
                live.give_up(CancelledError("the client cancelled the request"))
        except Exception:
            if not live.sweep_failed:
                live.sweep_failed = True
                log.exception("whether a request was cancelled is unknown; tried again, logged once")

    def _watch_deadlines(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [live for live in self._live if live.deadline is not None and live.deadline <= now]
        for live in late:
            if live.failure is None and live.request.timeout_ms is not None:
                live.give_up(DeadlineError(live.request.timeout_ms))

    def _watch_drain(self) -> None:
        if self._refusal is None and self._should_drain():
            log.info("told to drain: no more requests are taken")
            threading.Thread(target=self.drain, name="drain", daemon=True).start()

    def _run_metrics(self) -> None:
        complained = False
        stopped = False
        while not stopped:
            stopped = self._stopping.wait(METRICS_PERIOD_S)
            client = self._engine.client
            try:
                self._metrics.write(
                    client,
                    num_restarts=self._engine.num_restarts,
                    num_sessions=self._sessions.num_sessions,
                    num_session_tokens=self._sessions.num_tokens,
                )
            except Exception:
                if not complained:
                    complained = True
                    log.exception("metrics could not be written, some counts are lost; logged once")
