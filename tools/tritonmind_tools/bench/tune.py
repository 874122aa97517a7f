"""`tritonmind bench tune`: find the fastest tiles of a model's kernels on this card; write them where launches look.

Each candidate is compiled by worker processes, dropped if it spills, and timed like `bench kernels`: in a CUDA graph,
out of cold caches. The library's product is a candidate too. What was found when the time is over is written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.options import add_layers_shape
from tritonmind_tools.bench.report import PRECISIONS, Progress, Report, add_output_options, print_table
from tritonmind_tools.bench.shapes import SHAPES

if TYPE_CHECKING:
    from tritonmind.kernels.tile_table import Card, Tile
    from tritonmind_tools.bench.tune_cases import Task

    Jobs = list[tuple[Task, Tile]]

MAX_PROCESSES = 16
WHOLE_PRODUCTS = {"output"}  # nothing follows that takes partial sums
MARGIN = 0.01  # by which a tile must beat the library, whose products need no compilation


@dataclass(frozen=True)
class Pick:
    """The best tile of a task so far. num_tried: tiles that were timed."""

    tile: Tile
    seconds: float
    library_seconds: float
    num_tried: int


def register(kinds: Any) -> None:
    """Add `bench tune`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "tune", help="find the fastest tiles on this card", description=__doc__
    )
    add_layers_shape(parser)
    parser.add_argument("--kernel", metavar="NAME,...", help="some of the kernels that have tiles (default: all)")
    parser.add_argument("--max-rows", type=int, metavar="N", help="steps for up to so many rows (default: all)")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS", help="default %(default)s")
    parser.add_argument("--output", metavar="FILE", help="the file of tiles (default: this card's, in the package)")
    add_output_options(parser, plots=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, print a table, write the tiles. Raises ConfigError for a wrong option or without a GPU."""
    import torch

    from tritonmind.kernels import tuning
    from tritonmind.kernels.tile_table import KERNELS

    names = args.kernel.split(",") if args.kernel else list(KERNELS)
    for name in names:
        if name not in KERNELS:
            raise ConfigError(f"--kernel={name!r} has no tiles; those that have are {', '.join(KERNELS)}")
    if not args.budget > 0:
        raise ConfigError(f"--budget={args.budget} must be a number of seconds above 0")
    if args.max_rows is not None and args.max_rows < 1:
        raise ConfigError(f"--max-rows={args.max_rows} must be at least 1")
    if not torch.cuda.is_available():
        raise ConfigError("bench tune needs an NVIDIA GPU, and PyTorch sees none: tiles are for a card's kernels")
    card = tuning.card(torch.device("cuda"))
    output = Path(args.output) if args.output else tuning.SHIPPED / tuning.file_name(card.name)
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output={str(output)!r}: its folder does not exist; make it first")
    before = _read(output, card)
    deadline = time.monotonic() + args.budget
    _measure(args, names, card, deadline, output, before)
    return 0


def _measure(
    args: argparse.Namespace, names: Sequence[str], card: Card, deadline: float, output: Path, before: dict[str, Any]
) -> None:
    import torch
    import triton

    from tritonmind_tools.bench import machine, tune_cases
    from tritonmind_tools.bench.kernel_case import Setting, kv_precision

    report, dtype = Report.from_args(args), torch.float16
    bandwidth, rate = machine.copy_bandwidth(), machine.matmul_rate(dtype)
    setting = Setting(SHAPES[args.shape], dtype, torch.device("cuda"))
    tasks = [task for task in tune_cases.tasks(setting, names) if task.max_rows <= (args.max_rows or task.max_rows)]
    compilers = tune_cases.Compilers(setting, min(os.cpu_count() or 1, MAX_PROCESSES))

    def time_left() -> float:
        return deadline - time.monotonic()

    try:
        picks = search(
            tasks,
            card,
            lambda jobs: compilers.usable(jobs, time_left),
            lambda task, tile: tune_cases.seconds(setting, task, tile),
            lambda: time_left() <= 0,
        )
    finally:
        compilers.close()
    rows = []
    for task, pick in picks.items():
        work = tune_cases.case(setting, task, tune_cases.point(task))
        fastest = max(work.num_bytes / bandwidth, work.num_flops / rate)
        precision = task.weight_precision or PRECISIONS[str(dtype).removeprefix("torch.")]
        precision += kv_precision(task.product)
        rows.append(_row(task, pick, args.shape, precision, work.num_bytes, fastest))
    _print_rows(rows)
    output.write_text(written(merged(before, card.name, triton.__version__, picks)))
    report.notes.update(
        {"copy bandwidth": f"{bandwidth / 1e9:.1f} GB/s", "matrix product": f"{rate / 1e12:.1f} TFLOP/s"}
    )
    report.notes["searches"] = f"{len(picks)} of {len(tasks)}" + (", the time was over" if time_left() <= 0 else "")
    report.notes["tiles"] = str(output)
    report.print_facts()
    report.write(rows)


def search(
    tasks: Sequence[Task],
    card: Card,
    usable: Callable[[Jobs], Jobs],
    seconds: Callable[[Task, Tile], float],
    is_over: Callable[[], bool],
) -> dict[Task, Pick]:
    """The best tile for each task, wave by wave. usable: which of these compile well. seconds: infinite if refused.

    When the time is over, tasks have the best of what was timed, and no entry if that is nothing.
    """
    from tritonmind.kernels.tile_candidates import candidates
    from tritonmind.kernels.tile_table import KERNELS, LIBRARY, MANY_ROWS, takes_many_rows

    picks: dict[Task, Pick] = {}
    timed: dict[Task, dict[Tile, float]] = {task: {} for task in tasks}
    wave = 0
    while True:
        jobs = []
        for task in tasks:
            # Those whose settings the next wave varies.
            own = [found for found in timed[task] if not (found.is_whole or found.warp_groups)]
            best = min(own, key=timed[task].__getitem__, default=None)
            found = list(candidates(task.kernel, card, task.named_sizes(), task.rows, wave, best))
            if task.product in WHOLE_PRODUCTS:
                found = [tile for tile in found if tile.splits == 1]
            if not wave and "library" in KERNELS[task.kernel].whole:
                found.append(LIBRARY)
                if "many_rows" in KERNELS[task.kernel].whole and takes_many_rows(card, task.named_sizes()):
                    found.append(MANY_ROWS)
            jobs += [(task, tile) for tile in found if tile not in timed[task]]
        if not jobs or is_over():
            return picks
        good = usable(jobs)
        by_task = {task: [tile for other, tile in good if other == task] for task, _ in good}
        with Progress(len(by_task)) as progress:
            for task, tiles in by_task.items():
                progress.begin(f"wave {wave + 1}: {task.kernel} {task.sizes} rows={task.rows}, {len(tiles)} tiles")
                for tile in tiles:
                    if is_over():
                        return picks
                    timed[task][tile] = seconds(task, tile)
                    if timed[task][tile] < math.inf:
                        picks[task] = _pick(timed[task])
        wave += 1


def _pick(timed: Mapping[Tile, float]) -> Pick:
    from tritonmind.kernels.tile_table import LIBRARY

    library = timed.get(LIBRARY, math.inf)
    tile = min(timed, key=timed.__getitem__)
    if timed[tile] > (1 - MARGIN) * library:
        tile = LIBRARY
    return Pick(tile, timed[tile], library, len(timed))


def merged(before: dict[str, Any], card_name: str, triton_version: str, picks: Mapping[Task, Pick]) -> dict[str, Any]:
    """The content of a file of tiles: what it held, with new steps at the sizes that were searched.

    Of an old ladder the steps for more rows than were searched stay: the time may have been over before.
    """
    from tritonmind.kernels import tuning
    from tritonmind.kernels.tile_table import KERNELS

    found = {name: list(entries) for name, entries in before.get("kernels", {}).items()}
    for kernel, sizes in dict.fromkeys((task.kernel, task.sizes) for task in picks):
        spec = KERNELS[kernel]
        named = dict(zip(spec.sizes, sizes, strict=True))
        steps = sorted(
            (task.max_rows, pick.tile) for task, pick in picks.items() if (task.kernel, task.sizes) == (kernel, sizes)
        )
        kept = [
            entry
            for entry in found.get(kernel, [])
            if any(entry[name] != named[name] for name in named) or entry["max_rows"] > steps[-1][0]
        ]
        for index, (max_rows, tile) in enumerate(steps):
            if index + 1 < len(steps) and steps[index + 1][1] == tile:
                continue  # the next step says the same
            settings = {name: getattr(tile, name) for name in spec.fields_of(tile)}
            kept.append({**named, "max_rows": max_rows, **settings})
        found[kernel] = sorted(kept, key=lambda entry: [entry[name] for name in (*spec.sizes, "max_rows")])
    content = {"card": card_name, "triton": triton_version, "kernels": found}
    tuning.parse(content, card_name)
    return content


def written(content: Mapping[str, Any]) -> str:
    """The file's text, a tile a line."""
    kernels = []
    for name, entries in content["kernels"].items():
        lines = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
        kernels.append(f"    {json.dumps(name)}: [\n{lines}\n    ]")
    facts = "".join(f"  {json.dumps(key)}: {json.dumps(content[key])},\n" for key in ("card", "triton"))
    return "{\n" + facts + '  "kernels": {\n' + ",\n".join(kernels) + "\n  }\n}\n"


def _read(path: Path, card: Card) -> dict[str, Any]:
    """What the file holds that will be written anew; a wrong one is not written over."""
    from tritonmind.kernels import tuning

    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        tuning.parse(content, card.name)
    except ValueError as error:
        raise ConfigError(f"--output={str(path)!r} is no file of tiles for this card: {error}; name another") from error
    assert isinstance(content, dict)
    return content


def _row(task: Task, pick: Pick, shape: str, precision: str, num_bytes: float, fastest: float) -> dict[str, Any]:
    from tritonmind.kernels.tile_table import KERNELS

    fields = KERNELS[task.kernel].fields_of(pick.tile)
    return {
        "workload": f"tune {task.product} rows={task.rows}",
        "shape": shape,
        "precision": precision,
        "value": pick.seconds * 1e6,
        "unit": "us",
        "roofline_fraction": fastest / pick.seconds,
        "kernel": task.kernel,
        "sizes": task.named_sizes(),
        "tile": {name: getattr(pick.tile, name) for name in fields},
        "num_bytes": num_bytes,
        "library_us": pick.library_seconds * 1e6 if pick.library_seconds < math.inf else None,
        "num_tried": pick.num_tried,
    }


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    from tritonmind.kernels.tile_table import WHOLE

    lines = []
    for row in rows:
        tile = " ".join(f"{name}={value}" for name, value in row["tile"].items())
        library = f"{row['library_us']:.1f}" if row["library_us"] else ""
        lines.append(
            (
                row["workload"].removeprefix("tune "), f"{row['value']:.1f}", library,
                f"{row['num_bytes'] / row['value'] / 1e6:.2f}", f"{row['roofline_fraction']:.0%}",
                next((name for name in WHOLE if name in row["tile"]), tile),
            )
        )  # fmt: skip
    print_table(("work", "us", "library us", "TB/s", "roofline", "tile"), lines)
