"""The same requests through a server and on a bare engine, in one run: `bench serving --self-host`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tritonmind.random_model import AUTO
from tritonmind.workspace import Workspace
from tritonmind_tools.bench import grid, machine
from tritonmind_tools.bench.load import Target
from tritonmind_tools.bench.options import chosen_settings, engine_dtype, named_shape
from tritonmind_tools.bench.report import Report, print_table
from tritonmind_tools.bench.report import precision as precision_of
from tritonmind_tools.bench.rounds import run_round
from tritonmind_tools.bench.self_host import (
    API_SERVER,
    TRITON,
    bare_engine,
    engine_settings,
    hosted,
    hosted_api,
    model_folder,
    served_workspace,
)
from tritonmind_tools.bench.serving_load import WARM_UP_TOKENS, Load, make_row, measure
from tritonmind_tools.bench.shapes import shape_name
from tritonmind_tools.embedded_server import MODEL_NAME

BARE_ENGINE = "bare engine"


def measure_both(args: argparse.Namespace, report: Report, loads: list[Load]) -> list[dict[str, Any]]:
    """Rows of the server, then, of those loads that are equal requests all at once, rows of the engine.

    A server's row says in ratio_to_engine which share of the engine's tokens a second it had.
    """
    with served_workspace(args.self_host, named_shape(args)) as workspace:
        return _measure_both(workspace, args, report, loads)


def _measure_both(workspace: Path, args: argparse.Namespace, report: Report, loads: list[Load]) -> list[dict[str, Any]]:
    model = Workspace.open(model_folder(workspace) / "1").model
    chosen = chosen_settings(args)
    if engine_dtype(args) != AUTO:
        chosen["dtype"] = engine_dtype(args)
    settings = {
        "enable_prefix_caching": False,
        "check_integrity_when_idle": False,
        "max_num_seqs": args.max_batch,
        **chosen,
    }
    bandwidth = machine.copy_bandwidth()
    with _hosted(workspace, args, settings) as address:
        target = Target(address, MODEL_NAME, model.vocab_size, args.processes, args.text_prompts)
        results = measure(target, args, report, loads)
        if args.front_end == TRITON:
            settings = engine_settings(address)
    report.notes["front end"] = args.front_end
    report.notes["settings"] = ", ".join(f"{name}={value}" for name, value in settings.items())
    batches = [load for load in loads if load.is_batch]
    engine_rows: dict[str, grid.Row] = {}
    with bare_engine(workspace, settings) as client:
        precision = precision_of(model, client.info.dtype, client.info.quant_policy)
        # The rate of arithmetic is for rows of prompts alone, of which there are none.
        facts = grid.Facts(
            model, client.info.dtype, bandwidth, float("inf"), client.info.max_num_seqs, client.info.quant_policy
        )
        for load in batches:
            workload = grid.batch(len(load.lengths), *load.lengths[0])
            warm_up = [(prompt, min(answer, WARM_UP_TOKENS)) for prompt, answer in load.lengths]
            run_round(client, model, warm_up, seed=f"{load.name} warm-up")
            rounds = [
                run_round(client, model, load.lengths, seed=f"{load.name} {number}") for number in range(args.rounds)
            ]
            engine_rows[load.name] = grid.make_row(workload, rounds, facts, BARE_ENGINE)
    rows = []
    for load, result in results:
        row = make_row(load, result, shape_name(model), precision)
        engine = engine_rows.get(load.name)
        if engine is not None:
            ratio = result.tokens_per_second / engine.tokens_per_second
            row |= {"ratio_to_engine": ratio, "roofline_fraction": engine.roofline_fraction * ratio}
        rows.append(row)
    _print(rows, engine_rows)
    return [*rows, *(dataclasses.asdict(row) for row in engine_rows.values())]


@contextmanager
def _hosted(workspace: Path, args: argparse.Namespace, settings: dict[str, object]) -> Iterator[str]:
    """The address of a server with the chosen front end."""
    if args.front_end == API_SERVER:
        with hosted_api(workspace, settings) as address:
            yield address
    else:
        with hosted(workspace, settings) as server:
            yield server.address


def _print(rows: list[dict[str, Any]], engine_rows: dict[str, grid.Row]) -> None:
    compared = [row for row in rows if row["workload"] in engine_rows]
    lines = [
        [
            row["workload"],
            f"{row['tokens_per_second']:.0f}",
            f"{engine_rows[row['workload']].tokens_per_second:.0f}",
            f"{row['ratio_to_engine']:.1%}",
        ]
        for row in compared
    ]
    if lines:
        print_table(("workload", "server tok/s", "bare engine tok/s", "server / engine"), lines)
