"""Between a front end and the engine: each accepted request is answered, and ended exactly once, whatever happens.

Threads and their order of effects. `accept` registers a request and returns. An intake thread tokenises and submits
it. The engine client's receive thread only appends token outputs to the request's inbox and rings its lane. A lane
(one of a few sender threads; a request stays on its own) drains the inbox, turns everything pending into one response
and sends it. The sweeper polls for cancellation and watches the engine. Whoever gives a request up records the
failure first, then aborts it in the engine, then rings its lane: only the lane ever sends.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from tritonmind.chat_template import ChatTemplate
from tritonmind.config import ModelConfig
from tritonmind.errors import CancelledError, InvalidRequestError, TritonmindError, UnavailableError
from tritonmind.live_request import Answer, Lane, LiveRequest, Responder
from tritonmind.request_fields import ParsedRequest
from tritonmind.sampling_params import GenerationDefaults, resolve
from tritonmind.text_stream import TextStream
from tritonmind.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tritonmind.engine.client import EngineClient

EngineFailurePolicy = Literal["restart", "exit"]

NUM_LANES = 4
NUM_INTAKE_THREADS = 2
SWEEP_PERIOD_S = 0.05
ENGINE_STOP_TIMEOUT_S = 5.0
MAX_RESTART_DELAY_S = 30.0
NUM_FINISH_ATTEMPTS = 3
FINISH_RETRY_DELAY_S = 0.05
SWEEP_COMPLAINT_PERIOD_S = 60.0

log = logging.getLogger("tritonmind")


class RequestServer:
    """Answers requests with an engine that it starts, watches and, when it fails, replaces.

    start: makes an engine; blocks until it is ready. What it raises at first leaves the constructor; later it is tried
    again. on_engine_exit: called once after an engine failure instead of a restart, when the policy is "exit".
    should_drain: polled; once it is true the server drains for drain_timeout seconds and takes no more requests.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        defaults: GenerationDefaults,
        model: ModelConfig,
        start: Callable[[], EngineClient],
        engine_failure: EngineFailurePolicy = "restart",
        on_engine_exit: Callable[[], None] = lambda: None,
        should_drain: Callable[[], bool] = lambda: False,
        drain_timeout: float,
    ) -> None:
        self.num_accepted = 0
        self.num_finals = 0
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._defaults = defaults
        self._model = model
        self._start = start
        self._engine_failure = engine_failure
        self._on_engine_exit = on_engine_exit
        self._should_drain = should_drain
        self._drain_timeout = drain_timeout
        self._lock = threading.Lock()
        self._all_ended = threading.Condition(self._lock)
        self._live: dict[LiveRequest, None] = {}
        self._refusal: UnavailableError | None = None
        self._stopping = threading.Event()
        self._next_complaint = 0.0
        self._client: EngineClient | None = start()
        self._recovery: threading.Thread | None = None
        self._lanes: list[Lane] = [queue.SimpleQueue() for _ in range(NUM_LANES)]
        self._intake = ThreadPoolExecutor(NUM_INTAKE_THREADS, thread_name_prefix="intake")
        self._senders = [
            threading.Thread(target=self._run_lane, args=(lane,), name=f"sender-{i}", daemon=True)
            for i, lane in enumerate(self._lanes)
        ]
        self._sweeper = threading.Thread(target=self._run_sweeper, name="sweeper", daemon=True)
        for thread in (*self._senders, self._sweeper):
            thread.start()

    def accept(self, request: ParsedRequest, responder: Responder) -> None:
        """Answer `request` through `responder`. Returns at once; every failure becomes a response."""
        live = self._register(request, responder)
        if self._refusal is not None:
            live.give_up(self._refusal)
            return
        try:
            self._intake.submit(self._submit, live)
        except RuntimeError:  # the pool was shut down between the check and now
            live.give_up(UnavailableError("the model is being unloaded"))

    def refuse(self, responder: Responder, error: TritonmindError) -> None:
        """Answer a request that cannot be accepted."""
        self._register(ParsedRequest(), responder).give_up(error)

    def is_ready(self) -> bool:
        """Whether requests can be answered now. Reads flags only."""
        client = self._client
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

        Takes the drain timeout, what is left of tokenising at most NUM_INTAKE_THREADS prompts (`_check_size` bounds
        those), and for the engine a few times ENGINE_STOP_TIMEOUT_S.
        """
        self.drain()
        self._stopping.set()
        self._sweeper.join()
        self._intake.shutdown(wait=True, cancel_futures=True)
        for lane in self._lanes:
            lane.put(None)
        for thread in self._senders:
            thread.join()
        if self._recovery is not None:
            self._recovery.join(ENGINE_STOP_TIMEOUT_S)
        log.info("requests accepted: %d, final responses sent: %d", self.num_accepted, self.num_finals)
        client, self._client = self._client, None
        if client is not None:
            self._log_engine(client)
            client.shutdown(ENGINE_STOP_TIMEOUT_S)

    def _register(self, request: ParsedRequest, responder: Responder) -> LiveRequest:
        with self._lock:
            live = LiveRequest(request, responder, self._lanes[self.num_accepted % NUM_LANES])
            self.num_accepted += 1
            self._live[live] = None
        return live

    def _submit(self, live: LiveRequest) -> None:
        """Intake thread: text to token ids to the engine."""
        try:
            if live.failure is not None:
                return
            client = self._client
            if client is None:
                restart = " and is being restarted" if self._engine_failure == "restart" else ""
                raise UnavailableError(f"the engine is down{restart}")
            token_ids, text = self._tokenise(live.request, client.info.max_model_len)
            live.engine_id = client.next_request_id()
            request = resolve(
                live.request.params,
                self._defaults,
                request_id=live.engine_id,
                prompt_token_ids=token_ids,
                vocab_size=self._model.vocab_size,
                max_model_len=client.info.max_model_len,
                eos_token_ids=self._model.eos_token_ids,
            )
            live.stream = TextStream(self._tokenizer, live.request.params.stop)
            live.answer = Answer(text=text if live.request.echo else "", num_input_tokens=len(token_ids))
            live.client = client
            client.submit(request, live.on_output)
            # Given up before the engine knew it: that abort came too early.
            if live.failure is not None:
                live.abort()
        except TritonmindError as error:
            live.give_up(error)
        except Exception as error:
            log.exception("a request failed before it reached the engine")
            live.give_up(TritonmindError(f"internal error: {error!r}"))

    def _tokenise(self, request: ParsedRequest, max_model_len: int) -> tuple[list[int], str]:
        """Token ids of the prompt, and its text if the answer is to begin with it."""
        tokenizer = self._tokenizer
        if request.input_ids is not None:
            return request.input_ids, tokenizer.decode(request.input_ids) if request.echo else ""
        if request.messages is not None:
            if self._chat_template is None:
                raise InvalidRequestError(
                    "messages", request.messages, "this checkpoint has no chat template: send text_input instead"
                )
            text = self._chat_template.render(request.messages)
            self._check_size("messages", text, max_model_len)
            return tokenizer.encode(text, add_special_tokens=False), text
        assert request.text is not None
        self._check_size("text_input", request.text, max_model_len)
        return tokenizer.encode_prompt(request.text), request.text

    def _check_size(self, field: str, text: str, max_model_len: int) -> None:
        """Refuse, before the work of encoding it, a text that cannot fit whatever its tokens are."""
        longest = self._tokenizer.longest_token
        num_bytes = len(text.encode())
        if num_bytes > max_model_len * longest:
            raise InvalidRequestError(
                field,
                f"{num_bytes} bytes",
                f"session_len is {max_model_len} tokens and a token has at most {longest} bytes: send a shorter text",
            )

    def _run_lane(self, lane: Lane) -> None:
        while (live := lane.get()) is not None:
            # Before the inbox is read: what arrives from now on rings again.
            live.rung = False
            if live.closed:
                continue
            try:
                self._advance(live)
            except Exception as error:
                log.exception("a response could not be made or sent")
                live.abort()
                self._end(live, TritonmindError(f"internal error: {error!r}"))

    def _advance(self, live: LiveRequest) -> None:
        """Lane thread: one response with everything that is pending, if there is something to say."""
        if live.failure is not None:
            self._end(live, live.failure)
            return
        answer = live.answer
        while live.inbox and answer.finish_reason is None:
            output = live.inbox.popleft()
            if output.finish_reason == "error":
                self._end(live, UnavailableError(output.error or "the engine failed"))
                return
            if output.finish_reason == "cancelled":
                self._end(live, CancelledError("the request was cancelled"))
                return
            assert live.stream is not None
            delta = live.stream.push(output.token_ids, output.finish_reason, stop_token_id=output.stop_token_id)
            answer.text += delta.text
            answer.token_ids += delta.token_ids
            answer.num_output_tokens += delta.num_tokens
            answer.num_cached_tokens = output.num_cached_tokens
            answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
            if delta.finish_reason is not None and output.finish_reason is None:
                live.abort()  # a stop string: the engine does not know
        if answer.finish_reason is not None:
            live.responder.send(answer, final=True)
            self._end(live, None)
        elif live.request.stream and answer.text and answer.num_output_tokens:
            live.answer = Answer(num_input_tokens=answer.num_input_tokens, num_cached_tokens=answer.num_cached_tokens)
            live.responder.send(answer, final=False)

    def _end(self, live: LiveRequest, error: TritonmindError | None) -> None:
        """Lane thread: account for the last response, sending it if it is an error."""
        live.closed = True
        sent = error is None or self._send_error(live.responder, error)
        with self._all_ended:
            del self._live[live]
            self.num_finals += sent
            self._all_ended.notify_all()

    def _send_error(self, responder: Responder, error: TritonmindError) -> bool:
        """End a request with `error`, or else just end it. Whether either worked."""
        try:
            responder.fail(error)
            return True
        except Exception:
            log.exception("the last response of a request could not be sent; ending it without: %s", error)
        for _ in range(NUM_FINISH_ATTEMPTS):
            try:
                responder.finish()
                return True
            except Exception as cause:
                log.error("a request could not be ended: %r", cause)
                time.sleep(FINISH_RETRY_DELAY_S)
        return False

    def _run_sweeper(self) -> None:
        while not self._stopping.wait(SWEEP_PERIOD_S):
            for watch in (self._watch_engine, self._watch_drain):
                try:
                    watch()
                except Exception:
                    # Likely again at every sweep.
                    if time.monotonic() >= self._next_complaint:
                        self._next_complaint = time.monotonic() + SWEEP_COMPLAINT_PERIOD_S
                        log.exception("the engine or the order to drain could not be looked at; tried again")
            with self._lock:
                lives = list(self._live)
            for live in lives:
                self._watch_client(live)

    def _watch_client(self, live: LiveRequest) -> None:
        try:
            if live.failure is None and live.responder.is_cancelled():
                live.give_up(CancelledError("the client cancelled the request"))
        except Exception:
            if not live.sweep_failed:
                live.sweep_failed = True
                log.exception("whether a request was cancelled is unknown; tried again, logged once")

    def _watch_drain(self) -> None:
        if self._refusal is None and self._should_drain():
            log.info("told to drain: no more requests are taken")
            threading.Thread(target=self.drain, name="drain", daemon=True).start()

    def _watch_engine(self) -> None:
        client = self._client
        if client is not None and not client.is_alive():
            recovery = threading.Thread(target=self._recover, args=(client,), name="recovery", daemon=True)
            self._client = None
            try:
                recovery.start()
            except RuntimeError:  # no thread to be had: the next sweep finds the dead engine again
                self._client = client
                raise
            self._recovery = recovery

    def _recover(self, failed: EngineClient) -> None:
        """Fail what the dead engine owed, then start another one, waiting longer after each attempt, or leave."""
        log.error("the engine failed; its requests are answered UNAVAILABLE; policy: %s", self._engine_failure)
        try:
            failed.shutdown(ENGINE_STOP_TIMEOUT_S)
        except Exception:
            log.exception("what is left of the failed engine could not be removed")
        if self._engine_failure == "exit":
            self._on_engine_exit()
            return
        delay = 1.0
        while not self._stopping.is_set():
            begin = time.monotonic()
            try:
                client = self._start()
            except Exception as error:
                text = error if isinstance(error, TritonmindError) else repr(error)
                log.error("the engine did not start again, next attempt in %g s: %s", delay, text)
                self._stopping.wait(delay)
                delay = min(2 * delay, MAX_RESTART_DELAY_S)
                continue
            if self._stopping.is_set():
                client.shutdown(ENGINE_STOP_TIMEOUT_S)
            else:
                self._client = client
                log.info("the engine is back after %.1f s", time.monotonic() - begin)
            return

    def _log_engine(self, client: EngineClient) -> None:
        """The engine's state after the last request: nothing may be left in use."""
        try:
            client.check_integrity(ENGINE_STOP_TIMEOUT_S)
            stats = client.stats(ENGINE_STOP_TIMEOUT_S)
        except Exception as error:  # closing goes on; AssertionError is what a failed check raises
            log.error("the engine's state is unknown or wrong: %r", error)
            return
        log.info(
            "engine: %d running, %d waiting; blocks: %d free, %d cached, %d used of %d; "
            "kernels compiled while serving: %d; integrity checked",
            stats.num_running,
            stats.num_waiting,
            stats.num_free_blocks,
            stats.num_cached_blocks,
            stats.num_used_blocks,
            stats.num_blocks,
            stats.num_jit_compiles,
        )
