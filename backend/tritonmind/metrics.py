"""What a served model tells its server's metrics: counted by the threads that answer, written by one of its own.

Writing a value is a call to the server's process, so nothing is written per token: counts are collected and written a
few times a second, and a histogram gets one value a request.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from tritonmind.errors import DeadlineError, TritonmindError
from tritonmind.messages import EngineInfo, EngineStats

if TYPE_CHECKING:
    from tritonmind.engine.client import EngineClient

# Seconds. Powers of about 2, from a token on a fast GPU to a long answer on a CPU.
_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0)
_WAIT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_REQUEST_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)

REASONS = ("stop", "length", "cancelled", "deadline", "invalid_arg", "not_found", "unavailable", "internal")


class _Family(NamedTuple):
    """A family of values that differ in `label`, or the one value of a family without labels of its own."""

    name: str
    description: str
    label: str = ""
    values: tuple[str, ...] = ("",)


_COUNTERS = (
    _Family("tritonmind_requests_finished_total", "Requests that ended, by reason", "reason", REASONS),
    _Family("tritonmind_prompt_tokens_total", "Prompt tokens of answered requests"),
    _Family("tritonmind_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache"),
    _Family("tritonmind_generated_tokens_total", "Tokens sent in answers"),
    _Family("tritonmind_preemptions_total", "Times a running request had to give its blocks up"),
    _Family("tritonmind_engine_restarts_total", "Engines started in place of one that died"),
)
_GAUGES = (
    _Family("tritonmind_requests", "Requests in the engine, by state", "state", ("running", "waiting")),
    _Family("tritonmind_kv_blocks", "Blocks of the KV cache, by state", "state", ("free", "cached", "used")),
    _Family("tritonmind_sessions", "Sessions that are remembered"),
    _Family("tritonmind_session_tokens", "Tokens in the histories of all sessions"),
    # The name and labels that the Triton server's ORCA header reads.
    _Family(
        "nv_trt_llm_kv_cache_block_metrics",
        "Blocks of the KV cache",
        "kv_cache_block_type",
        ("max", "free", "used", "tokens_per", "fraction"),
    ),
)
_SESSION_GAUGES = ("tritonmind_sessions", "tritonmind_session_tokens")
_HISTOGRAMS = (
    (_Family("tritonmind_queue_time_seconds", "From arrival until the engine begins"), _WAIT_BUCKETS),
    (_Family("tritonmind_time_to_first_token_seconds", "From arrival to the first token"), _WAIT_BUCKETS),
    (
        _Family("tritonmind_inter_token_latency_seconds", "Mean time between the tokens of an answer, one per request"),
        _TOKEN_BUCKETS,
    ),
    (_Family("tritonmind_request_duration_seconds", "From arrival to the end of a complete answer"), _REQUEST_BUCKETS),
)


@dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """Seconds of one request, None where it did not get that far. Names as the histograms'."""

    queue_time: float | None = None
    time_to_first_token: float | None = None
    inter_token_latency: float | None = None
    request_duration: float | None = None


def reason_of(error: TritonmindError) -> str:
    """Under which reason a request that ended with `error` is counted."""
    return "deadline" if isinstance(error, DeadlineError) else error.code.lower()


class Metrics:
    """The metrics of one served model. The counting methods are thread-safe; one thread writes.

    family: the server's MetricFamily, None where there are no metrics: then nothing is kept. labels: on every value.
    What `family` raises leaves the constructor.
    """

    def __init__(self, family: Any | None, labels: Mapping[str, str]) -> None:
        self._enabled = family is not None
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = {}
        self._times: list[RequestTimes] = []
        self._written: dict[tuple[str, str], float] = {}
        self._engine: EngineClient | None = None
        self._num_preemptions = 0
        self._num_restarts = 0
        self._families: list[Any] = []
        self._values: dict[tuple[str, str], Any] = {}
        if family is not None:
            self._create(family, labels)

    def count(self, name: str, amount: float = 1, *, value: str = "") -> None:
        """Add to the counter tritonmind_<name>_total, of the label's `value`."""
        if self._enabled:
            with self._lock:
                key = f"tritonmind_{name}_total", value
                self._counts[key] = self._counts.get(key, 0) + amount

    def observe(self, times: RequestTimes) -> None:
        if self._enabled:
            with self._lock:
                self._times.append(times)

    def write(
        self, engine: EngineClient | None, *, num_restarts: int, num_sessions: int, num_session_tokens: int
    ) -> None:
        """Write what was counted since the last time, and the engine's state where it changed."""
        if not self._enabled:
            return
        stats = None if engine is None else engine.latest_stats
        gauges: dict[tuple[str, str], float] = {
            ("tritonmind_sessions", ""): num_sessions,
            ("tritonmind_session_tokens", ""): num_session_tokens,
        }
        if engine is not self._engine:  # which begins to count anew
            self._engine, self._num_preemptions = engine, 0
        if engine is None or stats is None:
            gauges |= dict.fromkeys(_ENGINE_GAUGES, 0)
        else:
            gauges |= dict(zip(_ENGINE_GAUGES, _engine_state(engine.info, stats), strict=True))
            self.count("preemptions", stats.num_preemptions - self._num_preemptions)
            self._num_preemptions = stats.num_preemptions
        self.count("engine_restarts", num_restarts - self._num_restarts)
        self._num_restarts = num_restarts
        with self._lock:
            counts, self._counts = self._counts, {}
            times, self._times = self._times, []
        for key, amount in counts.items():
            if amount:
                self._values[key].increment(amount)
        for key, value in gauges.items():
            if self._written.get(key) != value:
                self._values[key].set(value)
                self._written[key] = value
        for each in times:
            for field in fields(each):
                seconds = getattr(each, field.name)
                histogram = self._values.get((f"tritonmind_{field.name}_seconds", ""))
                if seconds is not None and histogram is not None:
                    histogram.observe(seconds)

    def close(self) -> None:
        """Give the metrics back to the server, which wants that before the model is gone."""
        self._enabled = False
        self._values.clear()
        self._families.clear()

    def _create(self, family: Any, labels: Mapping[str, str]) -> None:
        for kind, specs in ((family.COUNTER, _COUNTERS), (family.GAUGE, _GAUGES)):
            for spec in specs:
                made = family(name=spec.name, description=spec.description, kind=kind)
                self._families.append(made)
                for value in spec.values:
                    own = {spec.label: value} if spec.label else {}
                    self._values[spec.name, value] = made.Metric(labels={**labels, **own})
        if not hasattr(family, "HISTOGRAM"):  # servers before 24.08
            return
        for spec, buckets in _HISTOGRAMS:
            made = family(name=spec.name, description=spec.description, kind=family.HISTOGRAM)
            self._families.append(made)
            self._values[spec.name, ""] = made.Metric(labels=dict(labels), buckets=list(buckets))


_ENGINE_GAUGES = tuple(
    (spec.name, value) for spec in _GAUGES if spec.name not in _SESSION_GAUGES for value in spec.values
)


def _engine_state(info: EngineInfo, stats: EngineStats) -> tuple[float, ...]:
    """In the order of _ENGINE_GAUGES."""
    return (
        stats.num_running,
        stats.num_waiting,
        stats.num_free_blocks,
        stats.num_cached_blocks,
        stats.num_used_blocks,
        stats.num_blocks,
        stats.num_free_blocks + stats.num_cached_blocks,
        stats.num_used_blocks,
        info.block_size,
        stats.num_used_blocks / stats.num_blocks,
    )
