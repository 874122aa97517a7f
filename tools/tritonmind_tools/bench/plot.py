"""`tritonmind bench plot`: recorded results as PNGs, each against its roofline.

Step time against batch and against context (`bench static --sweep`), the share of the roofline of each row (`bench
static`, `bench throughput`), each row beside other engines' (`bench compare`, docs/benchmarks/peers_h100.json),
throughput and latency against offered load (`bench serving --rates`). Of several results for one row the newest is
drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.recorded import OUR_ENGINE, read_results, row_key

DPI = 150
SIZE = (8.0, 5.0)  # inches
COLOURS = ("#1f6fb4", "#d9651a", "#2f9245", "#8a4fb0", "#b8860b", "#c23b5a", "#4aa3a2", "#555555")
GREY = "#777777"
OUR_PARTS = {"server", "bare engine"}  # `bench serving` holds them against each other
MAX_MS_SPAN = 20  # beyond this ratio of largest to least step time the axis is logarithmic

_STEP_ROW = re.compile(r"decode_batch(\d+)_context(\d+)")
_RATE_ROW = re.compile(r"(.+)_rate(\d+(?:\.\d+)?)")

Row = Mapping[str, Any]


class Series(NamedTuple):
    """One line: its name and rows by what they are drawn against."""

    name: str
    points: dict[float, Row]


def register(kinds: Any) -> None:
    """Add `bench plot`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "plot", help="draw PNGs of results that were written as JSON", description=__doc__
    )
    parser.add_argument("results", nargs="+", metavar="RESULT.json", help="what --json or --record wrote")
    parser.add_argument("--plot", metavar="DIR", required=True, help="where the PNGs go")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw and name the files. Raises ConfigError for a file without results, or with none that can be drawn."""
    require_matplotlib()
    paths = draw([read_results(Path(name)) for name in args.results], Path(args.plot))
    if not paths:
        raise ConfigError(f"{', '.join(args.results)}: no rows of static, throughput or serving --rates to draw")
    for path in paths:
        print(path)
    return 0


def require_matplotlib() -> None:
    """Raise ConfigError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'tritonmind[bench]'; or draw --json's file elsewhere")


def draw(results: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Draw what there is to draw of these results. Returns the files."""
    rows = newest_rows(results)
    directory.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[list[Row], Any], list[Row]]] = {
        "step_time_by_batch": _by_batch,
        "step_time_by_context": _by_context,
        "roofline": _roofline,
        "engines": _engines,
        "offered_load": _offered_load,
    }
    paths = []
    for name, drawing in drawings.items():
        figure = _figure()
        if drawn := drawing(rows, figure):
            cards, commits = (
                ", ".join(dict.fromkeys(str(row[name]) for row in drawn if name in row)) for name in ("card", "commit")
            )
            figure.supxlabel(f"{cards} · tritonmind {commits}", x=0.99, ha="right", size=7, color=GREY)
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], dpi=DPI)
    return paths


def newest_rows(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Every row once, in the order of the results, with the figures of the newest, their card, commit and date."""
    rows: dict[tuple[str, ...], tuple[datetime, Row]] = {}
    for result in results:
        date = datetime.fromisoformat(result["date"])
        for row in result["rows"]:
            key = (result["card"], *row_key(row))
            if key not in rows or rows[key][0] <= date:
                facts = {name: result[name] for name in ("card", "commit", "date") if name in result}
                rows[key] = date, {**row, **facts}
    return [row for _, row in rows.values()]


def _figure() -> Any:
    # Without pyplot: no window system, no state shared between figures.
    from matplotlib.figure import Figure

    return Figure(figsize=SIZE, layout="constrained")


def _axes(figure: Any, title: str, x_label: str, y_label: str, position: int | tuple[int, int, int] = 111) -> Any:
    axes = figure.add_subplot(*position) if isinstance(position, tuple) else figure.add_subplot(position)
    axes.set_title(title, loc="left", size=11, weight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _model(row: Row) -> str:
    return f"{row.get('shape', '')} {row.get('precision', '')}".strip()


def _series(rows: Iterable[Row], name: Callable[[Row], str], x: Callable[[Row], float]) -> list[Series]:
    """Rows by name and, within it, by x; lines of a single point are left out."""
    lines: dict[str, dict[float, Row]] = {}
    for row in rows:
        lines.setdefault(name(row), {})[x(row)] = row
    return [Series(key, dict(sorted(points.items()))) for key, points in lines.items() if len(points) > 1]


def _sizes(row: Row) -> tuple[int, int]:
    """Batch and context of a row of decode steps."""
    match = _STEP_ROW.fullmatch(row["workload"])
    assert match is not None
    return int(match[1]), int(match[2])


# Each of these draws what it finds among the rows, and returns the rows that it took.


def _by_batch(rows: list[Row], figure: Any) -> list[Row]:
    steps = [row for row in rows if _STEP_ROW.fullmatch(row["workload"])]
    lines = _series(steps, lambda row: f"{_model(row)}, context {_sizes(row)[1]}", lambda row: _sizes(row)[0])
    # Two batches of every context are no curve: those of the sweep over contexts.
    longest = max((len(line.points) for line in lines), default=0)
    lines = [line for line in lines if len(line.points) == longest or len(line.points) > 2]
    return _step_times(figure, lines, "Decode step time against batch", "sequences in the batch")


def _by_context(rows: list[Row], figure: Any) -> list[Row]:
    steps = [row for row in rows if _STEP_ROW.fullmatch(row["workload"])]
    lines = _series(steps, lambda row: f"{_model(row)}, batch {_sizes(row)[0]}", lambda row: _sizes(row)[1])
    return _step_times(figure, lines, "Decode step time against context", "tokens of each sequence")


def _step_times(figure: Any, lines: list[Series], title: str, x_label: str) -> list[Row]:
    if not lines:
        return []
    axes = _axes(figure, title, x_label, "ms a step")
    highest, lowest = 0.0, float("inf")
    for line, colour in zip(lines, _colours(len(lines)), strict=True):
        xs = list(line.points)
        times = [row["step_time"] * 1e3 for row in line.points.values()]
        ideal = [row["step_time"] * row["roofline_fraction"] * 1e3 for row in line.points.values()]
        axes.plot(xs, times, marker="o", markersize=4, color=colour, label=line.name)
        axes.plot(xs, ideal, linestyle="--", linewidth=1.2, color=colour)
        highest, lowest = max(highest, *times), min(lowest, *ideal)
    ticks = sorted({x for line in lines for x in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    if highest > MAX_MS_SPAN * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.plot([], [], linestyle="--", linewidth=1.2, color=GREY, label="roofline")
    axes.legend(frameon=False, fontsize=8)
    return _points(lines)


def _points(lines: Iterable[Series]) -> list[Row]:
    return [row for line in lines for row in line.points.values()]


def _roofline(rows: list[Row], figure: Any) -> list[Row]:
    shown = [row for row in rows if row.get("unit") in ("tok/s", "req/s") and row.get("roofline_fraction")]
    shown = [
        row for row in shown if not _STEP_ROW.fullmatch(row["workload"]) and not _RATE_ROW.fullmatch(row["workload"])
    ]
    if not shown:
        return []
    panels: dict[str, list[Row]] = {}
    for row in shown:
        panels.setdefault(_model(row), []).append(row)
    engines = list(dict.fromkeys(_engine(row) for row in shown))
    heights = {model: len(panel) for model, panel in panels.items()}
    all_axes = _by_model(figure, "Share of the roofline", heights, "% of the rate that the card could reach")
    for axes, panel in zip(all_axes, panels.values(), strict=True):
        for engine, colour in zip(engines, _colours(len(engines)), strict=True):
            numbers = [number for number, row in enumerate(panel) if _engine(row) == engine]
            shares = [100 * panel[number]["roofline_fraction"] for number in numbers]
            bars = axes.barh(numbers, shares, height=0.8, color=colour, label=engine if numbers else None)
            labels = [f"{_figures(panel[number]['value'])} {panel[number]['unit']}" for number in numbers]
            axes.bar_label(
                bars, labels, padding=4, size=7, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            )
        axes.axvline(100, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
        axes.set_yticks(range(len(panel)), [row["workload"] for row in panel], size=7)
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.set_xlim(0, max(135.0, *(125 * row["roofline_fraction"] for row in shown)))
    _legend(figure, len(engines))
    return shown


def _by_model(figure: Any, title: str, heights: Mapping[str, int], x_label: str) -> list[Any]:
    """Axes for each model, in two columns, all with room for as many bars as the highest has."""
    columns = min(2, len(heights))
    lines = -(-len(heights) // columns)
    figure.set_size_inches(SIZE[0] * (1 + 0.5 * (columns - 1)), 1.0 + lines * (0.6 + 0.17 * max(heights.values())))
    figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold")
    found = [_axes(figure, model, x_label, "", (lines, columns, number)) for number, model in enumerate(heights, 1)]
    for axes in found:
        axes.grid(False, axis="y")
    return found


def _legend(figure: Any, columns: int) -> None:
    """One for all axes."""
    legends = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for found in legends for handle, label in zip(*found, strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper right", ncols=columns, frameon=False, fontsize=8)


def _engines(rows: list[Row], figure: Any) -> list[Row]:
    """Values over ours, of what we and others measured on one card, one shape and in one precision."""
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if _engine(row) not in OUR_PARTS:
            groups.setdefault((row["workload"], _model(row), row["card"]), {})[_engine(row)] = row
    shown = {key: group for key, group in groups.items() if OUR_ENGINE in group and len(group) > 1}
    if not shown:
        return []
    engines = list(dict.fromkeys([OUR_ENGINE, *(engine for group in shown.values() for engine in group)]))
    colours = dict(zip(engines, _colours(len(engines)), strict=True))
    panels: dict[str, dict[str, dict[str, Row]]] = {}
    for (workload, model, _), group in shown.items():
        panels.setdefault(model, {})[workload] = group
    heights = {model: sum(len(group) + 1 for group in panel.values()) for model, panel in panels.items()}
    all_axes = _by_model(figure, "Beside other engines", heights, "rate / tritonmind's")
    for axes, panel in zip(all_axes, panels.values(), strict=True):
        _engine_bars(axes, panel, colours)
    _legend(figure, len(engines))
    return [group[OUR_ENGINE] for group in shown.values()]


def _engine_bars(axes: Any, panel: Mapping[str, Mapping[str, Row]], colours: Mapping[str, str]) -> None:
    """The groups of bars of one model, by workload and engine."""
    bars: dict[str, list[tuple[float, Row, Row]]] = {}
    ticks = []
    position = 0.0
    for group in panel.values():
        ticks.append(position + (len(group) - 1) / 2)
        for engine in (engine for engine in colours if engine in group):
            bars.setdefault(engine, []).append((position, group[engine], group[OUR_ENGINE]))
            position += 1
        position += 1
    for engine, drawn in bars.items():
        shares = [row["value"] / ours["value"] for _, row, ours in drawn]
        labels = [f"{_figures(row['value'])} {row['unit']}" for _, row, _ in drawn]
        places = [place for place, _, _ in drawn]
        patches = axes.barh(places, shares, height=0.85, color=colours[engine], label=engine)
        axes.bar_label(patches, labels, padding=4, size=7)
    axes.set_yticks(ticks, list(panel), size=7)
    axes.set_ylim(position - 1.2, -0.8)
    axes.margins(x=0.24)


def _engine(row: Row) -> str:
    return str(row.get("engine", OUR_ENGINE))


def _offered_load(rows: list[Row], figure: Any) -> list[Row]:
    offered = [(row, match) for row in rows if (match := _RATE_ROW.fullmatch(row["workload"]))]
    loads = {id(row): (f"{_model(row)}, {match[1]}", float(match[2])) for row, match in offered}
    # A line is of one run: what stood beside it was the same.
    last = {loads[id(row)][0]: row["date"] for row, _ in sorted(offered, key=lambda found: found[0]["date"])}
    newest = [row for row, _ in offered if row["date"] == last[loads[id(row)][0]]]
    lines = _series(newest, lambda row: loads[id(row)][0], lambda row: loads[id(row)][1])
    if not lines:
        return []
    figure.set_size_inches(SIZE[0], 1.6 * SIZE[1])
    served = _axes(figure, "Throughput against offered load", "offered req/s", "completed req/s", 211)
    waited = _axes(figure, "Time to the first token", "offered req/s", "ms", 212)
    for line, colour in zip(lines, _colours(len(lines)), strict=True):
        xs = list(line.points)
        # Not requests over wall time, most of which a short run spends waiting for its longest answers.
        served.plot(xs, [row["value"] for row in line.points.values()], marker="o", color=colour, label=line.name)
        for percent, style in ((50, "-"), (99, "--")):
            times = [1e3 * row[f"time_to_first_token_p{percent}"] for row in line.points.values()]
            waited.plot(xs, times, style, marker="o", markersize=4, color=colour, label=f"{line.name}: p{percent}")
    longest = max(x for line in lines for x in line.points)
    served.plot([0, longest], [0, longest], "--", color=GREY, linewidth=1.2, zorder=1, label="all that is offered")
    served.set_xlim(left=0)
    served.set_ylim(bottom=0)
    waited.set_xlim(left=0)
    waited.set_yscale("log")
    waited.yaxis.set_major_formatter("{x:g}")
    waited.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:g}"[0] in "235" else "")
    for axes in (served, waited):
        axes.legend(frameon=False, fontsize=8)
    return _points(lines)


def _figures(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
