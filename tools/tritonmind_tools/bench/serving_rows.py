"""What a load on a server comes to: latencies as its clients saw them, throughput and goodput."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tritonmind.errors import UnavailableError
from tritonmind_tools.bench.load import LoadResult
from tritonmind_tools.bench.load_client import Outcome
from tritonmind_tools.bench.rounds import percentile

BUSY_CLIENT = 0.8  # of a core: beyond it the measurement may be of the client


class Slo(NamedTuple):
    """What a request must keep to count for goodput, in seconds; None is no limit."""

    time_to_first_token: float | None = None
    inter_token: float | None = None

    def __bool__(self) -> bool:
        return self.time_to_first_token is not None or self.inter_token is not None


@dataclass(frozen=True)
class Percentiles:
    """Of times in seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """Zeros if there are none, as where answers come in one message."""
        return cls(*(percentile(seconds, percent) if len(seconds) else 0.0 for percent in (50, 90, 99)))

    def columns(self, name: str) -> dict[str, float]:
        return {f"{name}_{key}": value for key, value in vars(self).items()}


@dataclass(frozen=True)
class Served:
    """One load. Times in seconds, from when a request was due: it waits for a busy client too.

    message_gap: between the messages of an answer. inter_token: the same shared out evenly among the tokens that came
    with the later message, for each of them. goodput: requests a second that kept the objectives, None without any.
    wall: from the first request to the last token. num_short: answers of fewer tokens than asked for. sustained:
    answers a second in the second half of the time in which requests arrived, each counted by the share of its tokens
    that came then.
    """

    num_requests: int
    num_failed: int
    num_short: int
    first_error: str
    wall: float
    tokens_per_second: float
    requests_per_second: float
    sustained: float
    goodput: float | None
    time_to_first_token: Percentiles
    inter_token: Percentiles
    message_gap: Percentiles
    latency: Percentiles
    tokens_per_message: float
    prefix_cache_rate: float
    late_p99: float
    client_cpu: float

    def row(self, workload: str, shape: str, precision: str) -> dict[str, object]:
        """Columns of a row of results, without its value and unit."""
        return {
            "workload": workload,
            "shape": shape,
            "precision": precision,
            "num_requests": self.num_requests,
            "num_failed": self.num_failed,
            "tokens_per_second": self.tokens_per_second,
            "requests_per_second": self.requests_per_second,
            "goodput": self.goodput,
            **self.time_to_first_token.columns("time_to_first_token"),
            **self.inter_token.columns("inter_token"),
            **self.message_gap.columns("message_gap"),
            **self.latency.columns("latency"),
            "tokens_per_message": self.tokens_per_message,
            "prefix_cache_rate": self.prefix_cache_rate,
            "client_cpu": self.client_cpu,
            "wall": self.wall,
        }


def served(result: LoadResult, slo: Slo) -> Served:
    """Sum a load up. UnavailableError with the endpoint's words if no request was answered."""
    answered, errors = [], []
    for outcome in result.outcomes:
        if outcome.error or not outcome.times:
            errors.append(outcome.error or "an answer without tokens")
        else:
            answered.append(outcome)
    if not answered:
        raise UnavailableError(f"none of {len(result.outcomes)} requests was answered, the first one: {errors[0]}")
    wall = max(outcome.times[-1] for outcome in answered) - min(outcome.due for outcome in result.outcomes)
    gaps = [np.diff(outcome.times) for outcome in answered]
    per_token = [_per_token(outcome, each) for outcome, each in zip(answered, gaps, strict=True)]
    num_prompt = sum(outcome.prompt_tokens for outcome in answered)
    num_tokens = sum(outcome.num_tokens for outcome in answered)
    return Served(
        num_requests=len(result.outcomes),
        num_failed=len(errors),
        num_short=sum(outcome.num_tokens < outcome.output_tokens for outcome in answered),
        first_error=errors[0] if errors else "",
        wall=wall,
        tokens_per_second=num_tokens / wall,
        requests_per_second=len(answered) / wall,
        sustained=_sustained(answered),
        goodput=sum(_keeps(outcome, slo) for outcome in answered) / wall if slo else None,
        time_to_first_token=Percentiles.of([outcome.times[0] - outcome.due for outcome in answered]),
        inter_token=Percentiles.of(np.concatenate(per_token).tolist()),
        message_gap=Percentiles.of(np.concatenate(gaps).tolist()),
        latency=Percentiles.of([outcome.times[-1] - outcome.due for outcome in answered]),
        tokens_per_message=num_tokens / sum(len(outcome.times) for outcome in answered),
        prefix_cache_rate=sum(outcome.num_cached for outcome in answered) / num_prompt,
        late_p99=percentile([outcome.sent - outcome.due for outcome in result.outcomes], 99),
        client_cpu=max(result.client_cpu),
    )


def _per_token(outcome: Outcome, gaps: np.ndarray) -> np.ndarray:
    """The time of each token but the first message's. Where an endpoint says at its end that there were more tokens
    than messages, each message had as many of them."""
    counts = np.array(outcome.counts[1:], dtype=np.int64)
    more = outcome.num_tokens / sum(outcome.counts)
    return np.repeat(gaps / np.maximum(1, counts * more), counts)


def _sustained(answered: list[Outcome]) -> float:
    """What goes on while requests arrive, without the beginning and without the end of the last long answers."""
    first, last = (extreme(outcome.due for outcome in answered) for extreme in (min, max))
    middle = (first + last) / 2
    if last == first:
        return 0.0
    shares = [
        sum(count for moment, count in zip(outcome.times, outcome.counts, strict=True) if middle < moment <= last)
        / sum(outcome.counts)
        for outcome in answered
    ]
    return sum(shares) / (last - middle)


def _keeps(outcome: Outcome, slo: Slo) -> bool:
    """Whether a request kept the objectives; of its time between tokens, the mean."""
    first, last = outcome.times[0], outcome.times[-1]
    between = (last - first) / (outcome.num_tokens - 1) if outcome.num_tokens > 1 else 0.0
    return (slo.time_to_first_token is None or first - outcome.due <= slo.time_to_first_token) and (
        slo.inter_token is None or between <= slo.inter_token
    )


def median_of(rounds: Sequence[Served]) -> Served:
    """The round with the median rate of tokens, of an even number the slower one."""
    rate = statistics.median_low(each.tokens_per_second for each in rounds)
    return next(each for each in rounds if each.tokens_per_second == rate)
