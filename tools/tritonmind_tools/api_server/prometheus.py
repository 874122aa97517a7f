"""Metrics kept in this process and written as Prometheus' text: what `tritonmind.metrics` asks of a server."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Value:
    """One value of a family: a counter, a gauge, or with `buckets` a histogram."""

    def __init__(self, labels: Mapping[str, str], buckets: Sequence[float] = ()) -> None:
        self._labels = dict(labels)
        self._buckets = list(buckets)
        self._counts = [0] * (len(self._buckets) + 1)
        self._value = 0.0
        self._lock = threading.Lock()

    def increment(self, amount: float = 1) -> None:
        with self._lock:
            self._value += amount

    def set(self, value: float) -> None:
        self._value = value

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(self._buckets, value)] += 1
            self._value += value

    def lines(self, name: str) -> list[str]:
        if not self._buckets:
            return [f"{name}{_braced(self._labels)} {_written(self._value)}"]
        with self._lock:
            counts, total = list(self._counts), self._value
        lines, below = [], 0
        for bound, count in zip([*(f"{bound:g}" for bound in self._buckets), "+Inf"], counts, strict=True):
            below += count
            lines.append(f"{name}_bucket{_braced({**self._labels, 'le': bound})} {below}")
        return [
            *lines,
            f"{name}_sum{_braced(self._labels)} {_written(total)}",
            f"{name}_count{_braced(self._labels)} {below}",
        ]


class Family:
    """Values of one name. Its methods are the Triton server's, which `tritonmind.metrics` calls."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name
        self._head = [f"# HELP {name} {description}", f"# TYPE {name} {kind}"]
        self._values: list[Value] = []

    def Metric(self, labels: Mapping[str, str], buckets: Sequence[float] = ()) -> Value:
        value = Value(labels, buckets)
        self._values.append(value)
        return value

    def lines(self) -> list[str]:
        return [*self._head, *(line for value in list(self._values) for line in value.lines(self.name))]


class Registry:
    """All families of a server. An object of it is the MetricFamily that `tritonmind.metrics.Metrics` takes."""

    COUNTER, GAUGE, HISTOGRAM = Family.COUNTER, Family.GAUGE, Family.HISTOGRAM

    def __init__(self) -> None:
        self._families: list[Family] = []

    def __call__(self, *, name: str, description: str, kind: str) -> Family:
        family = Family(name, description, kind)
        self._families.append(family)
        return family

    def text(self) -> str:
        """Everything, as Prometheus reads it."""
        return "".join(f"{line}\n" for family in self._families for line in family.lines())


def _written(value: float) -> str:
    """All digits: of a counter that lost some, nobody could tell how much it grew."""
    return repr(float(value)).removesuffix(".0")


def _braced(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
