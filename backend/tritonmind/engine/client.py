"""EngineClient: how everyone else talks to an engine, whether it runs in this process or in its own.

Every submitted request gets exactly one TokenOutput with a finish_reason, whatever happens: if the engine dies or is
shut down, that is "error" with the cause. Callbacks run on the client's receive thread and must be cheap.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from tritonmind.errors import ConfigError, InvalidRequestError, TritonmindError, UnavailableError
from tritonmind.messages import (
    Abort,
    Call,
    EngineFailed,
    EngineInfo,
    EngineRequest,
    EngineStats,
    FromEngine,
    Heartbeat,
    Reply,
    StepOutputs,
    ToEngine,
    TokenOutput,
)

OnOutput = Callable[[TokenOutput], None]
Method = Literal["stats", "check_integrity", "reset_prefix_cache", "shutdown"]

# Heartbeats come between steps. On a CPU a step of a large model takes minutes; on a GPU nothing near it.
HEARTBEAT_TIMEOUT_S = {"cpu": 900.0, "cuda": 60.0}
_ERRORS_BY_CODE: dict[str, Callable[[str], TritonmindError]] = {
    "INVALID_ARG": ConfigError,
    "UNAVAILABLE": UnavailableError,
}


class EngineClient(ABC):
    """Submits requests and routes their outputs. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, OnOutput] = {}
        self._replies: dict[int, queue.SimpleQueue[Reply]] = {}
        self._call_ids = itertools.count()
        self._next_request_id = 0
        self._info: EngineInfo | None = None
        self._started = threading.Event()  # set by EngineInfo or by a failure
        self._failure: TritonmindError | None = None
        self._latest_stats: EngineStats | None = None
        self._last_heard = time.monotonic()

    @property
    def info(self) -> EngineInfo:
        """Facts of the ready engine."""
        assert self._info is not None, "the engine is not ready"
        return self._info

    @property
    def latest_stats(self) -> EngineStats | None:
        """The statistics of the last heartbeat, a step or a quarter of a second old; None before the first."""
        return self._latest_stats

    def next_request_id(self, count: int = 1) -> int:
        """The first of `count` ids in a row that no other request of this client has."""
        with self._lock:
            first = self._next_request_id
            self._next_request_id += count
        return first

    def submit(self, request: EngineRequest, on_output: OnOutput) -> None:
        """Send a request made by `sampling_params.resolve`. UnavailableError if the engine cannot take it now."""
        self.submit_all([request], on_output)

    def submit_all(self, requests: Sequence[EngineRequest], on_output: OnOutput) -> None:
        """Send requests, all or none, at once: no step of the engine comes between them.

        UnavailableError if the engine cannot take them now, InvalidRequestError if its queue is too short for them.
        """
        for request in requests:
            self._check(request)
        running, queued = self.info.max_num_seqs, self.info.max_queue_size
        if queued and len(requests) > running + queued:
            raise InvalidRequestError("n", len(requests), f"{running} may run and max_queue_size={queued} wait")
        with self._lock:
            if self._failure is not None:
                raise UnavailableError(f"the engine is down: {self._failure}")
            if queued and len(self._live) + len(requests) > running + queued:
                raise UnavailableError(
                    f"the queue is full: {len(self._live)} requests are live, {running} may run and "
                    f"max_queue_size={queued} wait; try again later"
                )
            assert not any(request.request_id in self._live for request in requests)
            self._send(*requests)
            self._live |= dict.fromkeys((request.request_id for request in requests), on_output)

    def stream(self, request: EngineRequest) -> Iterator[TokenOutput]:
        """Submit and yield the outputs as they come, the last one included. Leaving early aborts the request."""
        outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        self.submit(request, outputs.put)
        finished = False
        try:
            while not finished:
                output = outputs.get()
                finished = output.finish_reason is not None
                yield output
        finally:
            if not finished:
                self.abort([request.request_id])

    def abort(self, request_ids: Iterable[int]) -> None:
        """Give requests up. Never waits; ids that are not live are ignored. Their last output still comes."""
        with self._lock:
            live = [request_id for request_id in request_ids if request_id in self._live]
            if live and self._failure is None:
                self._send(Abort(request_ids=live))

    def stats(self, timeout: float = 5.0) -> EngineStats:
        """Fresh statistics."""
        stats = self._call("stats", timeout).stats
        assert stats is not None
        return stats

    def check_integrity(self, timeout: float = 30.0) -> None:
        """Have the engine re-derive its bookkeeping; AssertionError if something does not hold."""
        error = self._call("check_integrity", timeout).error
        assert error is None, error

    def reset_prefix_cache(self, timeout: float = 5.0) -> None:
        """Forget cached prefixes."""
        self._call("reset_prefix_cache", timeout)

    def is_alive(self) -> bool:
        """Whether the engine is ready, has not failed, and was heard of lately."""
        return self._info is not None and self._failure is None and not self._is_silent()

    def _is_silent(self) -> bool:
        """Whether a ready engine has given no sign of life for longer than a step can take."""
        if self._info is None:
            return False
        return time.monotonic() - self._last_heard > HEARTBEAT_TIMEOUT_S[self._info.device]

    def wait_ready(self) -> None:
        """Block until the engine is ready; raise what kept it from it. Loading takes as long as it takes."""
        try:
            self._started.wait()
        except KeyboardInterrupt:
            self.shutdown(timeout=0.0)
            raise
        if self._failure is not None:
            self.shutdown(timeout=1.0)
            raise self._failure

    def shutdown(self, timeout: float = 10.0) -> None:
        """Stop the engine, within `timeout` seconds. Live requests end with finish_reason "error". Idempotent."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(UnavailableError, TimeoutError):
            self._call("shutdown", timeout)
        self._fail(UnavailableError("the engine was shut down"))
        self._stop(max(0.0, deadline - time.monotonic()))

    @abstractmethod
    def _send(self, *messages: ToEngine) -> None:
        """Hand messages to the engine, all or none, which takes them between two steps. Never waits.

        Called with the lock held. What an engine that is gone does not take ends as soon as that is noticed.
        """

    @abstractmethod
    def _stop(self, timeout: float) -> None:
        """End the engine's process or thread, and our receive thread."""

    def _check(self, request: EngineRequest) -> None:
        """`sampling_params.resolve` has refused what a user may get wrong; past here it would take the engine down."""
        ids, info = request.prompt_token_ids, self.info
        assert 0 < len(ids) < info.max_model_len and min(ids) >= 0 and max(ids) < info.vocab_size
        assert 0 < request.max_tokens <= info.max_model_len - len(ids)

    def _call(self, method: Method, timeout: float) -> Reply:
        replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        call_id = next(self._call_ids)
        self._replies[call_id] = replies
        try:
            with self._lock:
                if self._failure is not None:
                    raise UnavailableError(f"the engine is down: {self._failure}")
                self._send(Call(call_id=call_id, method=method))
            reply = replies.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"the engine did not answer {method!r} within {timeout} s") from None
        finally:
            del self._replies[call_id]
        if self._failure is not None and reply.stats is None and method != "shutdown":
            raise UnavailableError(f"the engine is down: {self._failure}")
        return reply

    def _receive(self, message: FromEngine) -> None:
        self._last_heard = time.monotonic()
        match message:
            case StepOutputs():
                self._route(message)
            case Heartbeat():
                self._latest_stats = message.stats
            case Reply():
                replies = self._replies.get(message.call_id)
                if replies is not None:
                    replies.put(message)
            case EngineInfo():
                self._info = message
                self._started.set()
            case EngineFailed():
                self._fail(_ERRORS_BY_CODE.get(message.code, TritonmindError)(message.error))

    def _route(self, outputs: StepOutputs) -> None:
        routed: list[tuple[OnOutput, TokenOutput]] = []
        with self._lock:
            for output in outputs:
                last = output.finish_reason is not None
                on_output = self._live.pop(output.request_id, None) if last else self._live.get(output.request_id)
                if on_output is not None:
                    routed.append((on_output, output))
        for on_output, output in routed:
            on_output(output)

    def _fail(self, failure: TritonmindError) -> None:
        """End everything that waits for the engine. The first failure is the one that is reported."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
            live, self._live = self._live, {}
        self._started.set()
        for replies in list(self._replies.values()):
            replies.put(Reply(call_id=-1, error=str(failure)))
        for request_id, on_output in live.items():
            on_output(TokenOutput(request_id=request_id, token_ids=[], finish_reason="error", error=str(failure)))
