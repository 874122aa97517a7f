"""`tritonmind bench throughput`: a list of requests, submitted all at once, as fast as the engine can.

The figure is requests over wall time. Its roofline: every prompt's arithmetic at the rate of a large matrix product,
and the weights, K and V of decode steps with full batches at the copy bandwidth, one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from tritonmind_tools.bench import grid
from tritonmind_tools.bench.measure import Plan, measure, print_rows
from tritonmind_tools.bench.options import (
    add_engine_options,
    add_model_options,
    check_tokenizer,
    model_path,
    token_counter,
)
from tritonmind_tools.bench.report import Report, add_output_options, positive_numbers
from tritonmind_tools.bench.workloads import holds_texts

MAX_BATCH = 256
WARM_UP_REQUESTS, WARM_UP_TOKENS = 64, 16


def register(kinds: Any) -> None:
    """Add `bench throughput`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "throughput", help="requests per second of a list of requests", description=__doc__
    )
    add_model_options(parser)
    parser.add_argument(
        "--workload", required=True, help="mix1000, sharegpt3000, a CSV file of lengths, or ShareGPT's JSON"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="counts ShareGPT's tokens (default: the model's own)")
    parser.add_argument("--limit", type=int, help="take the first so many requests")
    parser.add_argument("--max-batch", type=int, default=MAX_BATCH, help="requests at once (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="the median counts (default %(default)s)")
    add_engine_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write files. Raises ConfigError for a wrong option or file."""
    for name in ("max_batch", "rounds", *(["limit"] if args.limit is not None else [])):
        positive_numbers(f"--{name.replace('_', '-')}", str(getattr(args, name)))
    model_path(args)
    check_tokenizer(args)
    counter = token_counter(args) if holds_texts(args.workload) else None
    workload = grid.requests(args.workload, args.limit or 0, counter)
    report = Report.from_args(args)
    plan = Plan(
        [workload],
        args.rounds,
        args.max_batch,
        warm_up_tokens=WARM_UP_TOKENS,
        warm_up_requests=WARM_UP_REQUESTS,
    )
    rows = measure(args, report, plan, note=f", {args.max_batch} at once").rows
    print_rows(
        rows,
        {
            "tok/s out": lambda row: f"{row.tokens_per_second:.0f}",
            "tok/s all": lambda row: f"{row.total_tokens_per_second:.0f}",
            "E2E s p50": lambda row: f"{row.latency_p50:.2f}",
            "p99": lambda row: f"{row.latency_p99:.2f}",
        },
    )
    report.print_facts()
    report.write([dataclasses.asdict(row) for row in rows])
    return 0
