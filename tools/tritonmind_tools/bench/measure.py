"""Measures workloads on one engine in a process of its own, as it is served, and prints what came of it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.grid import Facts, Row, Workload, make_row
from tritonmind_tools.bench.options import engine_overrides, model_path
from tritonmind_tools.bench.report import Progress, Report, print_table
from tritonmind_tools.bench.rounds import Round, run_round

if TYPE_CHECKING:
    from tritonmind.engine.client import EngineClient

HEADER = ("workload", "precision", "value", "", "TTFT ms", "p99", "ITL ms p50", "p99", "step ms", "CPU ms", "roofline")


class Plan(NamedTuple):
    """How workloads are measured. warm_up_tokens: of each answer in the round that does not count, 0 for all of them.

    warm_up_requests: 0 for all.
    """

    workloads: Sequence[Workload]
    rounds: int
    max_num_seqs: int
    warm_up_tokens: int = 0
    warm_up_requests: int = 0


class Measured(NamedTuple):
    """Rows in the plan's order, the rounds of each by its workload's name, and what they were measured against."""

    rows: list[Row]
    rounds: dict[str, list[Round]]
    facts: Facts


def measure(args: argparse.Namespace, report: Report, plan: Plan, note: str = "") -> Measured:
    """Measure the plan's workloads. Those that must fit the KV cache and do not are left out, with a note.

    args: as add_model_options and add_engine_options read them. Raises ConfigError for options that are wrong,
    UnavailableError when the engine fails.
    """
    from tritonmind.engine.device import resolve_device, resolve_dtype
    from tritonmind.engine.launch import start_engine
    from tritonmind.model_source import open_model
    from tritonmind_tools.bench import machine

    path = model_path(args)
    session_len = max(workload.max_len for workload in plan.workloads)
    overrides = engine_overrides(args, max_num_seqs=plan.max_num_seqs, max_model_len=session_len)
    source = open_model(path, dtype=overrides["dtype"])
    config = source.engine_config(**overrides)  # what is wrong with them is said before anything is measured
    dtype = resolve_dtype(config, resolve_device(config.device))
    bandwidth = machine.copy_bandwidth(args.num_threads)
    flops = machine.matmul_rate(dtype, args.num_threads)
    started = time.monotonic()
    client = start_engine(path, overrides)
    try:
        report.notes["engine"] = f"{client.info.device} {client.info.dtype}, {client.info.memory_plan}"
        report.notes["engine ready"] = f"after {time.monotonic() - started:.1f} s"
        facts = Facts(
            source.model, client.info.dtype, bandwidth, flops, client.info.max_num_seqs, client.info.quant_policy
        )
        report.notes["copy bandwidth"] = f"{bandwidth / 1e9:.1f} GB/s"
        report.notes["matmul rate"] = f"{flops / 1e12:.3g} TFLOP/s"
        report.notes["workload"] = f"greedy, ignore_eos, random ids, fresh each round{note}"
        fitting = [workload for workload in plan.workloads if _fits(workload, client)]
        left_out = [workload.name for workload in plan.workloads if workload not in fitting]
        if left_out:
            report.notes["left out"] = f"{', '.join(left_out)}: more than the KV cache holds"
        if not fitting:
            raise ConfigError(f"none of {', '.join(left_out)} fits the KV cache: {client.info.memory_plan}")
        with Progress(len(fitting)) as progress:
            rounds = {}
            for workload in fitting:
                progress.begin(workload.name)
                rounds[workload.name] = _rounds(client, facts, workload, plan)
        _note_stats(client, report)
    finally:
        client.shutdown()
    rows = [make_row(workload, rounds[workload.name], facts) for workload in fitting]
    if plan.rounds > 1:
        report.notes["spread"] = (
            f"at most {max(row.spread for row in rows):.1%} between the {plan.rounds} rounds of a row"
        )
    return Measured(rows, rounds, facts)


def print_rows(rows: Sequence[Row], more: dict[str, Callable[[Row], str]] | None = None) -> None:
    """A table of rows. more: further columns, what each holds of a row."""
    more = more or {}
    lines = []
    for row in rows:
        timings = (row.time_to_first_token, row.time_to_first_token_p99, row.inter_token_p50, row.inter_token_p99)
        shown = ["" if seconds is None else f"{seconds * 1e3:.1f}" for seconds in timings]
        step = f"{row.step_time * 1e3:.2f}" if row.output_len > 1 else ""
        cpu = "" if row.step_cpu is None else f"{row.step_cpu * 1e3:.2f}"
        value = f"{row.value:.5g}" if row.value < 1000 else f"{row.value:.0f}"
        cells = [row.workload, row.precision, value, row.unit, *shown, step, cpu, f"{row.roofline_fraction:.0%}"]
        lines.append([*cells, *(cell(row) for cell in more.values())])
    print_table([*HEADER, *more], lines)


def _rounds(client: EngineClient, facts: Facts, workload: Workload, plan: Plan) -> list[Round]:
    """After one that does not count."""
    warm_up = workload.lengths[: plan.warm_up_requests or None]
    if plan.warm_up_tokens:
        warm_up = [(prompt, min(answer, plan.warm_up_tokens)) for prompt, answer in warm_up]
    run_round(client, facts.model, warm_up, seed=f"{workload.name} warm-up")
    return [
        run_round(client, facts.model, workload.lengths, seed=round_seed(workload.name, number))
        for number in range(plan.rounds)
    ]


def round_seed(name: str, number: int) -> str:
    """What the prompts of a measured round are drawn from."""
    return f"{name} {number}"


def _fits(workload: Workload, client: EngineClient) -> bool:
    """Whether a row of decode steps has all its sequences at once; others are as good a measure with preemptions."""
    if workload.kind != "step":
        return True
    return (
        len(workload.lengths) <= client.info.max_num_seqs
        and workload.num_blocks(client.info.block_size) <= client.info.num_blocks
    )


def _note_stats(client: EngineClient, report: Report) -> None:
    stats = client.stats()
    rate = stats.num_cached_tokens / max(1, stats.num_prompt_tokens)
    report.notes["prefix cache"] = f"{rate:.1%} of {stats.num_prompt_tokens} prompt tokens were found there"
    report.notes["preemptions"] = str(stats.num_preemptions)
    report.notes["jit compiles"] = f"{stats.num_jit_compiles} after ready"
