"""An engine client without an engine: tests say what it outputs, and it keeps the real client's promises."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from tritonmind.errors import UnavailableError
from tritonmind.messages import EngineInfo, EngineRequest, EngineStats, FinishReason, TokenLogprob, TokenOutput


class FakeEngine:
    """Each submitted request stays live until the test (or an abort, a death, a shutdown) ends it.

    script: when set, called with each request on a thread of its own, to output by itself.
    """

    def __init__(self, info: EngineInfo, script: Callable[[FakeEngine, EngineRequest], None] | None = None) -> None:
        self.info = info
        self.submitted: list[EngineRequest] = []
        self.aborted: list[int] = []
        self.queue_full = False
        self.was_shut_down = False
        self.latest_stats: EngineStats | None = None
        self._alive = True
        self._script = script
        self._next_id = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._live: dict[int, Callable[[TokenOutput], None]] = {}

    def next_request_id(self, count: int = 1) -> int:
        first, self._next_id = self._next_id, self._next_id + count
        return first

    def submit_all(self, requests: list[EngineRequest], on_output: Callable[[TokenOutput], None]) -> None:
        for request in requests:
            self.submit(request, on_output)

    def submit(self, request: EngineRequest, on_output: Callable[[TokenOutput], None]) -> None:
        with self._changed:
            if not self._alive:
                raise UnavailableError("the engine is down")
            if self.queue_full:
                raise UnavailableError("the queue is full")
            self.submitted.append(request)
            self._live[request.request_id] = on_output
            self._changed.notify_all()
        if self._script is not None:
            threading.Thread(target=self._script, args=(self, request), daemon=True).start()

    def wait_for(self, count: int) -> EngineRequest:
        """The count-th submitted request, waiting for it."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.submitted) >= count, 5), f"no request number {count}"
            return self.submitted[count - 1]

    def output(
        self,
        request_id: int,
        token_ids: list[int],
        finish_reason: FinishReason | None = None,
        *,
        stop_token_id: int | None = None,
        error: str | None = None,
        num_cached_tokens: int = 0,
        queue_time_s: float | None = None,
        logprobs: list[TokenLogprob] | None = None,
        prompt_logprobs: list[TokenLogprob | None] | None = None,
    ) -> bool:
        """Give tokens out; False when the request has ended."""
        with self._lock:
            on_output = self._live.get(request_id)
            if finish_reason is not None:
                self._live.pop(request_id, None)
        if on_output is None:
            return False
        on_output(
            TokenOutput(
                request_id=request_id,
                token_ids=token_ids,
                num_cached_tokens=num_cached_tokens,
                finish_reason=finish_reason,
                stop_token_id=stop_token_id,
                error=error,
                queue_time_s=queue_time_s,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
        )
        return True

    def abort(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            self.aborted.append(request_id)
            self.output(request_id, [], "cancelled")

    def num_live(self) -> int:
        with self._lock:
            return len(self._live)

    def die(self, error: str = "killed by signal 9") -> None:
        with self._lock:
            self._alive = False
            live = list(self._live)
        for request_id in live:
            self.output(request_id, [], "error", error=error)

    def is_alive(self) -> bool:
        return self._alive

    def check_integrity(self, timeout: float = 30.0) -> None:
        assert not self._live, "requests are left in the engine"

    def stats(self, timeout: float = 5.0) -> EngineStats:
        counts = dict.fromkeys(EngineStats.__struct_fields__, 0)
        return EngineStats(**{**counts, "num_running": self.num_live()})

    def shutdown(self, timeout: float = 10.0) -> None:
        self.was_shut_down = True
        self.die("the engine was shut down")
