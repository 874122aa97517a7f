"""`tritonmind bench static`: batches of equal requests, submitted all at once.

A grid of batch sizes; the rows that other engines are compared on (--grid peers); or decode steps alone, against the
batch or the context (--sweep). The figure is generated tokens over wall time, prefill included; of a prefill row,
prompt tokens over wall time; of a sweep's, generated tokens over the time of the steps in which all decode.

The roofline of a step is the time to read the weights and the batch's K and V once at the machine's copy bandwidth,
that of a prefill the time of its arithmetic at the rate of a large matrix product. --quick takes two minutes and holds
the peers' rows against the last recorded ones of the same card.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from tritonmind.errors import ConfigError
from tritonmind_tools.bench import grid
from tritonmind_tools.bench.measure import Plan, measure, print_rows
from tritonmind_tools.bench.options import (
    add_engine_options,
    add_model_options,
    engine_dtype,
    engine_overrides,
    model_path,
)
from tritonmind_tools.bench.recorded import last_recorded, ratios
from tritonmind_tools.bench.report import RESULTS, Report, add_output_options, positive_numbers

BATCH_SIZES, INPUT_LEN, OUTPUT_LEN = "1,16", 128, 128
ROUNDS, SWEEP_ROUNDS = 3, 1
QUICK_WARM_UP_TOKENS = 8
MAX_BATCH = 256  # of the peers' rows


def register(kinds: Any) -> None:
    """Add `bench static`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "static", help="tokens per second of batches of equal requests", description=__doc__
    )
    add_model_options(parser)
    parser.add_argument("--batch-sizes", help=f"comma-separated (default {BATCH_SIZES}; a sweep's 1 to 256)")
    parser.add_argument("--input-len", type=int, help=f"prompt tokens of a request (default {INPUT_LEN})")
    parser.add_argument("--output-len", type=int, help=f"tokens it generates (default {OUTPUT_LEN})")
    parser.add_argument("--grid", choices=("peers",), help="the rows that other engines are compared on")
    parser.add_argument(
        "--sweep",
        action="append",
        choices=("batch", "context"),
        help=f"decode steps: of 1 to 256 sequences of {grid.SWEEP_CONTEXT} tokens, of 1 and 8 of 128 to 32768",
    )
    parser.add_argument("--max-context", type=int, default=grid.SWEEP_CONTEXTS[-1], help="of a sweep (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="the peers' rows in two minutes, beside the last recorded")
    parser.add_argument("--fail-below", type=float, metavar="RATIO", help="of --quick: exit status 1 for a lower ratio")
    parser.add_argument(
        "--rounds", type=int, help=f"measured rounds; the median counts (default {ROUNDS}, of a sweep {SWEEP_ROUNDS})"
    )
    add_engine_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write files. 1 when --fail-below was not reached, else 0. Raises ConfigError."""
    started = time.monotonic()
    _check(args)
    report = Report.from_args(args)
    recorded = last_recorded(Path(args.results), report.facts["card"]) if args.quick else {}
    rows = measure(args, report, _plan(args)).rows
    entries = [dataclasses.asdict(row) for row in rows]
    if not args.quick:
        print_rows(rows)
        report.print_facts()
        report.write(entries)
        return 0
    found = dict(zip((row.workload for row in rows), ratios(entries, recorded), strict=True))
    print_rows(rows, {"of recorded": lambda row: _percent(found[row.workload])})
    report.notes["quick"] = f"{time.monotonic() - started:.0f} s in all; never recorded"
    report.print_facts()
    report.write([{**entry, "ratio": found[entry["workload"]]} for entry in entries])
    return _verdict(found, args.fail_below)


def _verdict(found: dict[str, float | None], fail_below: float | None) -> int:
    """Say what is below the limit. Exit status."""
    if not any(found.values()):
        print("\nnothing is recorded for these workloads on this card: `bench static --grid peers --record` does it")
    if fail_below is None:
        return 0
    below = [f"{name} {_percent(ratio)}" for name, ratio in found.items() if ratio is not None and ratio < fail_below]
    if below:
        print(f"\nbelow {_percent(fail_below)} of the last recorded: {', '.join(below)}")
    return 1 if below or not any(found.values()) else 0


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1%}"


def _check(args: argparse.Namespace) -> None:
    """Options that exclude or need each other, and their ranges. Raises ConfigError."""
    model_path(args)
    for name in ("input_len", "output_len", "rounds", "max_context"):
        value = getattr(args, name)
        if value is not None:
            positive_numbers(f"--{name.replace('_', '-')}", str(value))
    fixed = [f"--{name}" for name in ("grid", "quick") if getattr(args, name)]
    if len(fixed) > 1 or (fixed and args.sweep):
        raise ConfigError(f"{' and '.join([*fixed, *(['--sweep'] if args.sweep else [])])}: give one of them")
    for name in ("batch_sizes", "input_len", "output_len"):
        if getattr(args, name) is not None and (fixed or (args.sweep and name == "output_len")):
            option = f"--{name.replace('_', '-')}={getattr(args, name)}"
            raise ConfigError(f"{option}: {(fixed or ['--sweep'])[0]} has its own; leave one of them out")
    if args.fail_below is not None and not args.quick:
        raise ConfigError(f"--fail-below={args.fail_below:g} needs --quick, whose ratios it looks at")
    if args.fail_below is not None and not args.fail_below > 0:
        raise ConfigError(f"--fail-below={args.fail_below:g} must be a ratio above 0, like 0.97")
    if args.quick and args.results != str(RESULTS) and not Path(args.results).is_dir():
        raise ConfigError(f"--results={args.results!r} is no folder; name one of recorded results, or leave it out")
    if args.quick and args.record:
        raise ConfigError("--record: a --quick run is too short to be recorded; leave one of them out")


def _plan(args: argparse.Namespace) -> Plan:
    if args.quick:
        return Plan(grid.peers(), args.rounds or 1, MAX_BATCH, warm_up_tokens=QUICK_WARM_UP_TOKENS)
    if args.grid:
        return Plan(grid.peers(), args.rounds or ROUNDS, MAX_BATCH)
    if args.sweep:
        workloads = _sweep(args)
        largest = max(len(workload.lengths) for workload in workloads)
        return Plan(workloads, args.rounds or SWEEP_ROUNDS, largest, warm_up_tokens=QUICK_WARM_UP_TOKENS)
    batch_sizes = positive_numbers("--batch-sizes", BATCH_SIZES if args.batch_sizes is None else args.batch_sizes)
    lengths = args.input_len or INPUT_LEN, args.output_len or OUTPUT_LEN
    return Plan([grid.batch(size, *lengths) for size in batch_sizes], args.rounds or ROUNDS, max(batch_sizes))


def _sweep(args: argparse.Namespace) -> list[grid.Workload]:
    """Each pair of batch and context once, with answers long enough for the steps that the engine needs for prompts."""
    from tritonmind.engine.core import resolve_limits
    from tritonmind.model_source import open_model

    pairs: list[tuple[int, int]] = []
    if "batch" in args.sweep:
        sizes = positive_numbers("--batch-sizes", args.batch_sizes) if args.batch_sizes else grid.SWEEP_BATCHES
        pairs += [(size, args.input_len or grid.SWEEP_CONTEXT) for size in sizes]
    if "context" in args.sweep:
        contexts = [context for context in grid.SWEEP_CONTEXTS if context <= args.max_context]
        pairs += [(size, context) for size in grid.CONTEXT_BATCHES for context in contexts]
    if not pairs:
        raise ConfigError(f"--max-context={args.max_context} leaves nothing of the sweep, which begins at 128")
    max_num_seqs = max(size for size, _ in pairs)
    overrides = engine_overrides(
        args, max_num_seqs=max_num_seqs, max_model_len=max(context for _, context in pairs) + 2
    )
    limits = resolve_limits(open_model(model_path(args), dtype=engine_dtype(args)).engine_config(**overrides))
    return [grid.steps(*pair, limits.max_num_batched_tokens) for pair in dict.fromkeys(pairs)]
