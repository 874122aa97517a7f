"""`tritonmind bench`: measurements that print their workload, versions, machine and share of the roofline."""

from __future__ import annotations

import argparse
from typing import Any

from tritonmind_tools.bench import (
    accuracy,
    compare,
    kernels,
    lm_eval_tasks,
    loading,
    memory,
    plot,
    profile,
    serving,
    static,
    throughput,
    tune,
)


def register(commands: Any) -> None:
    """Add `bench` and its kinds to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser("bench", help="measure the engine")
    kinds = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    static.register(kinds)
    throughput.register(kinds)
    serving.register(kinds)
    compare.register(kinds)
    accuracy.register(kinds)
    lm_eval_tasks.register(kinds)
    memory.register(kinds)
    loading.register(kinds)
    kernels.register(kinds)
    profile.register(kinds)
    tune.register(kinds)
    plot.register(kinds)
