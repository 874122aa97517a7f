"""Deadlines, priorities and metrics through model.py."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.backend.conftest import Served, error_of, eventually, texts
from tests.backend.fake_engine import FakeEngine
from tritonmind.errors import ConfigError
from tritonmind.messages import EngineStats


def int32(value: int) -> np.ndarray:
    return np.array([value], dtype=np.int32)


LIMITS: list[dict[str, Any]] = [
    {"timeout_ms": int32(150)},
    {"parameters": {"timeout": 150_000}},
    {"parameters": {"timeout": "150000"}},
    {"timeout": 150_000},
]


@pytest.mark.parametrize("limit", LIMITS)
def test_deadline_of_a_queued_request(served: Served, limit: dict[str, Any]) -> None:
    begin = time.monotonic()
    sender = served.send(text_input="a", **limit)
    error = error_of(sender)
    assert 0.14 < time.monotonic() - begin < 0.4
    assert error.code() == served.pb_utils.TritonError.UNAVAILABLE
    assert error.message() == "deadline exceeded after 150 ms"
    assert served.engine.aborted == [0]
    assert eventually(lambda: served.engine.num_live() == 0)


def test_tokens_sent_before_the_deadline_stay_sent(served: Served) -> None:
    sender = served.send(text_input="a", stream=True, timeout_ms=int32(200))
    other = served.send(text_input="a", stream=True, timeout_ms=int32(0))
    for count in (1, 2):
        served.engine.output(served.engine.wait_for(count).request_id, served.ids("b"))
    error = error_of(sender)
    assert error.message() == "deadline exceeded after 200 ms"
    assert [response.has_error() for response in sender.responses] == [False, True]
    assert texts(other) == ["b"], "0 is no limit"
    assert not other.final.is_set()
    other.cancelled = True
    error_of(other)


def test_deadline_counts_from_the_arrival(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a request waits to be tokenised."""
    prompts = served.model._server._prompts
    release = threading.Event()
    build = prompts.build

    def slow(*args: Any) -> Any:
        assert release.wait(30)
        return build(*args)

    monkeypatch.setattr(prompts, "build", slow)
    senders = [served.send(text_input="a", timeout_ms=int32(100)) for _ in range(5)]
    for sender in senders:
        assert "100 ms" in error_of(sender).message()
    release.set()
    assert eventually(lambda: served.engine.num_live() == 0)


def test_priority_reaches_the_engine(served: Served) -> None:
    served.send(text_input="a")
    served.send(text_input="a", priority=int32(3))
    served.send(text_input="a", parameters={"priority": 4})
    served.send(text_input="a", priority=int32(0))
    served.engine.wait_for(4)
    assert sorted(request.priority for request in served.engine.submitted) == [3, 4, 100, 100]


def test_default_priority_is_a_parameter(unloaded: Served) -> None:
    unloaded.load({"default_priority": "7", "drain_timeout_s": "0"})
    unloaded.send(text_input="a")
    assert unloaded.engine.wait_for(1).priority == 7


@pytest.mark.parametrize("name", ["max_sessions", "max_session_tokens", "default_priority"])
@pytest.mark.parametrize("text", ["0", "many", "1.5", "true", "4294967296"])
def test_bad_limit_is_named(unloaded: Served, name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*must be a whole number from 1"):
        unloaded.load({name: text})


@pytest.fixture
def families(adapter: ModuleType) -> Iterator[Any]:
    """The fake server's class of metric families, none of which may be left."""
    family = adapter.pb_utils.MetricFamily
    family.live.clear()  # those of other tests' models live until garbage is collected, and have the same names
    yield family
    gc.collect()
    assert not list(family.live), "families outlive the model"


def metric(families: Any, name: str, **labels: str) -> Any:
    key = tuple(sorted({"model": "tritonmind", "version": "1", **labels}.items()))
    return next(family for family in families.live if family.name == name).metrics[key]


def stats(**counts: int) -> EngineStats:
    zero = dict.fromkeys(EngineStats.__struct_fields__, 0)
    return EngineStats(**{**zero, "num_blocks": 8, **counts})


def test_requests_are_counted_by_how_they_end(families: Any, served: Served) -> None:
    def finished(reason: str) -> float:
        return metric(families, "tritonmind_requests_finished_total", reason=reason).total

    def observed(name: str) -> list[float]:
        return metric(families, f"tritonmind_{name}_seconds").observed

    begin = time.monotonic()
    for index, reason in enumerate(("stop", "length")):
        served.send(text_input="a" * 9, stream=True)
        request = served.engine.wait_for(index + 1)
        served.engine.output(request.request_id, [9, 9], num_cached_tokens=3, queue_time_s=0.25)
        served.engine.output(request.request_id, [9], reason, num_cached_tokens=3)
    error_of(served.send())
    error_of(served.send(cancel=True, request_id="x"))
    error_of(served.send(text_input="a", timeout_ms=int32(1)))
    served.engine.queue_full = True
    error_of(served.send(text_input="a"))
    expected = {"stop": 1, "length": 1, "invalid_arg": 1, "not_found": 1, "deadline": 1, "unavailable": 1}
    reasons = ("stop", "length", "cancelled", "deadline", "invalid_arg", "not_found", "unavailable", "internal")
    assert eventually(lambda: {reason: finished(reason) for reason in reasons if finished(reason)} == expected)
    # The counters are written before the histograms, whose last one is this.
    assert eventually(lambda: len(observed("request_duration")) == 2)
    seconds_passed = time.monotonic() - begin
    num_prompt = len(served.ids("a" * 9))
    assert metric(families, "tritonmind_generated_tokens_total").total == 6
    assert metric(families, "tritonmind_prompt_tokens_total").total == 2 * num_prompt
    assert metric(families, "tritonmind_prefix_cache_hit_tokens_total").total == 6
    for name in ("time_to_first_token", "inter_token_latency", "request_duration", "queue_time"):
        waited = 0.25 if name == "queue_time" else 0
        assert len(observed(name)) == 2, name
        assert all(waited < seconds < waited + seconds_passed for seconds in observed(name)), name


def test_engine_state_and_sessions_are_gauges(families: Any, served: Served) -> None:
    session = {"session_id": np.array([1], dtype=np.uint64)}
    served.send(text_input="ab", sequence_start=True, **session)
    served.engine.output(served.engine.wait_for(1).request_id, [9, 9], "length")
    served.engine.latest_stats = stats(
        num_running=3, num_waiting=2, num_free_blocks=1, num_cached_blocks=3, num_used_blocks=4, num_preemptions=5
    )
    last_one = metric(families, "nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="fraction")
    assert eventually(lambda: last_one.total == 0.5)
    assert metric(families, "tritonmind_requests", state="running").total == 3
    assert metric(families, "tritonmind_requests", state="waiting").total == 2
    assert metric(families, "tritonmind_preemptions_total").total == 5
    for state, count in (("free", 1), ("cached", 3), ("used", 4)):
        assert metric(families, "tritonmind_kv_blocks", state=state).total == count
    orca = {"max": 8, "free": 4, "used": 4, "tokens_per": 16, "fraction": 0.5}
    for kind, number in orca.items():
        assert metric(families, "nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type=kind).total == number
    assert metric(families, "tritonmind_sessions").total == 1
    assert metric(families, "tritonmind_session_tokens").total == len(served.ids("ab")) + 2


def test_counters_go_on_over_a_restart(families: Any, served: Served) -> None:
    served.engine.latest_stats = stats(num_preemptions=5, num_running=1)
    preemptions = metric(families, "tritonmind_preemptions_total")
    assert eventually(lambda: preemptions.total == 5)
    served.engine.die()
    assert eventually(lambda: len(served.engines) == 2 and served.model.is_ready())
    served.engine.latest_stats = stats(num_preemptions=7)
    assert eventually(lambda: preemptions.total == 12)
    assert eventually(lambda: metric(families, "tritonmind_engine_restarts_total").total == 1)
    assert eventually(lambda: metric(families, "tritonmind_requests", state="running").total == 0)


def test_nothing_is_written_per_token(families: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = metric(families, "tritonmind_generated_tokens_total")
    calls = []
    increment = generated.increment
    monkeypatch.setattr(generated, "increment", lambda value: (calls.append(value), increment(value)))
    served.send(text_input="a", stream=True)
    request = served.engine.wait_for(1)
    for _ in range(200):
        served.engine.output(request.request_id, [9])
    served.engine.output(request.request_id, [9], "length")
    assert eventually(lambda: generated.total == 201)
    assert len(calls) < 10


def test_metrics_that_are_off_or_fail_do_not_matter(
    unloaded: Served, families: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "supported", False)

    def script(engine: FakeEngine, request: Any) -> None:
        engine.output(request.request_id, [9], "length")

    unloaded.script = script
    unloaded.load()
    assert not list(families.live)
    sender = unloaded.send(text_input="a")
    assert sender.final.wait(30) and not sender.responses[-1].has_error()


def test_metrics_that_raise_do_not_matter(families: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = metric(families, "tritonmind_generated_tokens_total")
    increment, failures = generated.increment, [RuntimeError("the server is busy")]

    def failing(value: float) -> None:
        if failures:
            raise failures.pop()
        increment(value)

    monkeypatch.setattr(generated, "increment", failing)
    for count in (1, 2):
        sender = served.send(text_input="a")
        served.engine.output(served.engine.wait_for(count).request_id, [9], "length")
        assert sender.final.wait(30) and not sender.responses[-1].has_error()
        assert eventually(lambda: not failures)
    assert eventually(lambda: generated.total >= 1), "the writer ended"
