"""From what candidates scored to rows: draws of one recipe share one, with the spread among them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tritonmind_tools.bench.report import print_table

if TYPE_CHECKING:
    from tritonmind_tools.bench.accuracy_scores import Summary
    from tritonmind_tools.bench.evaluation import Way

HEADER = (
    "", "weights", "KV", "draws", "perplexity", "spread", "change %", "±", "KL", "spread", "p99", "top-1 %", "spread",
)  # fmt: skip
SPREAD = ("perplexity", "divergence", "same_top")  # whose spread rows say


class Candidate(NamedTuple):
    """A model to measure: what it is called, where it is, and how its K and V are stored (None: as it says itself)."""

    label: str
    path: str
    quant_policy: int | None


@dataclass(frozen=True)
class Row:
    """Draws of one recipe: means over them; each spread is largest less least, 0 for one. Fields as in Summary."""

    workload: str
    shape: str
    precision: str
    value: float  # perplexity
    unit: str
    engine: str
    label: str
    weights: str
    quant_policy: int
    draws: int
    num_texts: int
    num_tokens: int
    perplexity: float
    perplexity_spread: float
    perplexity_change: float
    change_error: float
    divergence: float
    divergence_spread: float
    high_divergence: float
    same_top: float
    same_top_spread: float


class Measured(NamedTuple):
    """One candidate's figures, and what it is."""

    candidate: Candidate
    summary: Summary
    precision: str
    weights: str
    quant_policy: int


def make_rows(measured: Sequence[Measured], *, shape: str, num_texts: int, num_tokens: int, way: Way) -> list[Row]:
    """The reference, which is the first, then a row for each label, weights and quant_policy in their order."""
    groups: dict[tuple[bool, str, str, int], list[Measured]] = {}
    for number, one in enumerate(measured):
        groups.setdefault((number == 0, one.candidate.label, one.weights, one.quant_policy), []).append(one)
    rows = []
    for (_, label, weights, quant_policy), draws in groups.items():
        columns = {name: [float(getattr(one.summary, name)) for one in draws] for name in draws[0].summary._fields}
        means = {name: statistics.fmean(values) for name, values in columns.items()}
        spreads = {f"{name}_spread": max(columns[name]) - min(columns[name]) for name in SPREAD}
        row = Row(
            workload=f"accuracy_{way}_{num_texts}_{num_tokens}",
            shape=shape,
            precision=draws[0].precision,
            value=means["perplexity"],
            unit="perplexity",
            engine=f"tritonmind {label}",
            label=label,
            weights=weights,
            quant_policy=quant_policy,
            draws=len(draws),
            num_texts=num_texts,
            num_tokens=num_tokens,
            **means,
            **spreads,
        )
        rows.append(row)
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    """The table: changes and shares in percent, divergences in nats."""
    lines = []
    for row in rows:
        several = row.draws > 1
        lines.append(
            (
                row.label,
                row.weights,
                "16 bit" if row.quant_policy == 0 else f"int8 ({row.quant_policy})",
                str(row.draws),
                f"{row.perplexity:.4f}",
                f"{row.perplexity_spread:.4f}" if several else "",
                f"{100 * row.perplexity_change:+.3f}",
                f"{100 * row.change_error:.3f}",
                f"{row.divergence:.5f}",
                f"{row.divergence_spread:.5f}" if several else "",
                f"{row.high_divergence:.4f}",
                f"{100 * row.same_top:.2f}",
                f"{100 * row.same_top_spread:.2f}" if several else "",
            )
        )
    print_table(HEADER, lines)


def as_entry(one: Measured) -> dict[str, Any]:
    """A candidate of its own, for files."""
    return {
        **one.candidate._asdict(),
        **one.summary._asdict(),
        "weights": one.weights,
        "quant_policy": one.quant_policy,
    }
