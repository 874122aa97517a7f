"""The loads of `bench serving`: which rows its options ask for, the measurement of each, and what is printed of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.load import Target, poisson, run_load
from tritonmind_tools.bench.load_client import Request
from tritonmind_tools.bench.report import Progress, Report, positive_numbers, print_table
from tritonmind_tools.bench.serving_rows import BUSY_CLIENT, Served, Slo, median_of, served
from tritonmind_tools.bench.workloads import read_workload, workload_name

INPUT_LEN, OUTPUT_LEN, NUM_REQUESTS = 128, 128, 1000
WARM_UP_TOKENS = 16
HEADER = (
    "workload", "value", "", "tok/s", "TTFT ms p50", "p90", "p99", "ITL ms p50", "p90", "p99", "gap ms p50", "p99",
    "E2E s p50", "p90", "p99", "tok/msg", "client CPU",
)  # fmt: skip


class Load(NamedTuple):
    """One row. rate: requests a second, 0 for num_slots requests at a time. lengths: prompt and answer tokens."""

    name: str
    lengths: Sequence[tuple[int, int]]
    num_slots: int = 0
    rate: float = 0.0

    @property
    def is_batch(self) -> bool:
        """Whether it is equal requests, all at once."""
        return self.num_slots == len(self.lengths) and len(set(self.lengths)) == 1


def loads(args: argparse.Namespace) -> list[Load]:
    """Rows in the order of the options, those of --concurrency first. Raises ConfigError."""
    streams = positive_numbers("--concurrency", args.concurrency) if args.concurrency else []
    rates = _rates(args.rates) if args.rates else []
    found = []
    if args.input_len or args.output_len or not args.workload:
        for slots, (prompt, answer) in zip(streams, _equal_lengths(args, len(streams)), strict=True):
            lengths = [(prompt, answer)] * (args.num_requests or slots)
            found.append(Load(f"server_{slots}_{prompt}_{answer}", lengths, num_slots=min(slots, len(lengths))))
        streams = []
    if args.workload:
        lengths = read_workload(args.workload, _counter(args))[: args.num_requests]
        name = f"server_{workload_name(args.workload)}"
    elif rates:
        ((prompt, answer),) = _equal_lengths(args, 1)
        lengths = [(prompt, answer)] * (args.num_requests or NUM_REQUESTS)
        name = f"server_{prompt}_{answer}"
    found += [Load(f"{name}_concurrency{slots}", lengths, num_slots=slots) for slots in streams]
    return found + [Load(f"{name}_rate{rate:g}", lengths, rate=rate) for rate in rates]


def _equal_lengths(args: argparse.Namespace, count: int) -> list[tuple[int, int]]:
    """Prompt and answer tokens for `count` rows."""
    prompts = _matching("--input-len", args.input_len or str(INPUT_LEN), count)
    answers = _matching("--output-len", args.output_len or str(OUTPUT_LEN), count)
    return list(zip(prompts, answers, strict=True))


def _matching(option: str, text: str, count: int) -> list[int]:
    """One number for all, or one each."""
    numbers = positive_numbers(option, text)
    if len(numbers) == 1:
        return numbers * count
    if len(numbers) != count:
        raise ConfigError(f"{option}={text!r} must be one number, or as many as --concurrency has, and one for a rate")
    return numbers


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"--rates={text!r} must be requests a second, more than 0, separated by commas")
    return rates


def _counter(args: argparse.Namespace) -> Callable[[str], int] | None:
    if not args.tokenizer:
        return None
    from tritonmind.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(Path(args.tokenizer))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def measure_url(args: argparse.Namespace, report: Report, loads: list[Load]) -> list[dict[str, object]]:
    """Rows of the endpoint that the options name."""
    target = Target(args.url, args.model, args.vocab_size, args.processes, args.text_prompts)
    results = measure(target, args, report, loads)
    return [make_row(load, each, args.shape or args.model, args.precision) for load, each in results]


def measure(target: Target, args: argparse.Namespace, report: Report, loads: list[Load]) -> list[tuple[Load, Served]]:
    """Put each load on the target, and print what came of it."""
    slo = Slo(*(None if limit is None else limit / 1e3 for limit in (args.slo_ttft, args.slo_itl)))
    results = []
    with Progress(len(loads)) as progress:
        for load in loads:
            progress.begin(load.name)
            results.append((load, _served(target, args, load, slo)))
    _print(results)
    _note(report, args, [each for _, each in results])
    return results


def make_row(load: Load, result: Served, shape: str, precision: str) -> dict[str, object]:
    """A row of results; of a rate it has the column rate, else concurrency."""
    offered = {"rate": load.rate} if load.rate else {"concurrency": load.num_slots}
    value, unit = _value(load, result)
    return {
        **result.row(load.name, shape, precision),
        "value": value,
        "unit": unit,
        "roofline_fraction": None,
        "engine": "server",
        **offered,
    }


def _value(load: Load, result: Served) -> tuple[float, str]:
    if load.rate:
        return result.sustained, "req/s"
    if len(set(load.lengths)) > 1:
        return result.requests_per_second, "req/s"
    return result.tokens_per_second, "tok/s"


def _served(target: Target, args: argparse.Namespace, load: Load, slo: Slo) -> Served:
    seed = f"{args.seed} {load.name}"
    if load.rate:
        arriving = poisson(load.lengths, load.rate, args.duration, args.seed)
        return served(run_load(target, arriving, seed=seed), slo)
    warm_up = [Request(prompt, min(answer, WARM_UP_TOKENS)) for prompt, answer in load.lengths[: load.num_slots]]
    run_load(target, warm_up, num_slots=load.num_slots, seed=f"{seed} warm-up")
    requests = [Request(*lengths) for lengths in load.lengths]
    return median_of(
        [
            served(run_load(target, requests, num_slots=load.num_slots, seed=f"{seed} {number}"), slo)
            for number in range(args.rounds if load.is_batch else 1)
        ]
    )


def _print(results: list[tuple[Load, Served]]) -> None:
    lines = []
    goodput = any(each.goodput is not None for _, each in results)
    for load, each in results:
        value, unit = _value(load, each)
        first, token, gap, whole = each.time_to_first_token, each.inter_token, each.message_gap, each.latency
        times = (first.p50, first.p90, first.p99, token.p50, token.p90, token.p99, gap.p50, gap.p99)
        cells = [load.name, f"{value:.5g}", unit, f"{each.tokens_per_second:.0f}"]
        cells += [f"{seconds * 1e3:.1f}" for seconds in times]
        cells += [f"{seconds:.2f}" for seconds in (whole.p50, whole.p90, whole.p99)]
        cells += [f"{each.tokens_per_message:.2f}", f"{each.client_cpu:.0%}"]
        lines.append([*cells, f"{each.goodput:.2f}"] if goodput else cells)
    print_table([*HEADER, "goodput req/s"] if goodput else HEADER, lines)


def _note(report: Report, args: argparse.Namespace, results: list[Served]) -> None:
    cached = max(each.prefix_cache_rate for each in results)
    report.notes["workload"] = "greedy, ignore_eos, random prompts, fresh each round and row"
    report.notes["prefix cache"] = f"at most {cached:.1%} of a row's prompt tokens were found there"
    report.notes["ITL"] = "per token: the gap between two messages over the tokens of the later; gap: between messages"
    busiest = max(each.client_cpu for each in results)
    report.notes["clients"] = f"{args.processes} processes, the busiest took {busiest:.0%} of a core"
    if busiest > BUSY_CLIENT:
        report.notes["warning"] = "a client process was too busy to be a fair observer: give more with --processes"
    late = max(each.late_p99 for each in results)
    report.notes["sent late"] = f"p99 {late * 1e3:.1f} ms after a request was due, which counts as waiting"
    num_failed, num_short = (sum(getattr(each, name) for each in results) for name in ("num_failed", "num_short"))
    if num_failed:
        first = next(each.first_error for each in results if each.first_error)
        report.notes["failed"] = f"{num_failed} requests, the first one: {first}"
    if num_short:
        report.notes["short"] = f"{num_short} answers ended before they had all tokens that were asked for"
