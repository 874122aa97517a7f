"""`tritonmind bench lm-eval`: tasks of lm-evaluation-harness on the engine, where their data is on this machine.

The harness is installed apart: pip install lm-eval. Nothing is fetched unless --allow-downloads is given: tasks whose
data lies in files, or was fetched before, run without a network.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.options import add_engine_options, engine_overrides
from tritonmind_tools.bench.report import Report, add_output_options, precision, print_table

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
ERROR_SUFFIX = "_stderr"


def register(kinds: Any) -> None:
    """Add `bench lm-eval`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "lm-eval", help="tasks of lm-evaluation-harness on the engine", description=__doc__
    )
    parser.add_argument("workspace", help="workspace or checkpoint")
    parser.add_argument("--tasks", required=True, help="comma-separated names")
    parser.add_argument("--include-path", metavar="DIR", help="folder with task definitions of your own")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--apply-chat-template", action="store_true", help="put questions as a user's turn")
    parser.add_argument("--allow-downloads", action="store_true", help="let the harness fetch data")
    add_engine_options(parser)
    add_output_options(parser, plots=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the tasks, print a table, write files. Raises ConfigError when the harness or a task is missing."""
    from tritonmind.engine.llm import LLM
    from tritonmind_tools.bench.lm_eval_adapter import EngineScorer, harness_model, require_harness
    from tritonmind_tools.bench.shapes import shape_name

    if args.include_path and not Path(args.include_path).is_dir():
        raise ConfigError(f"--include-path={args.include_path!r} is no folder")
    if not args.allow_downloads:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))  # read when the harness is imported
    require_harness()
    manager = _task_manager(args)
    report = Report.from_args(args)
    overrides = engine_overrides(args)
    # Questions of a task begin alike.
    with LLM(args.workspace, **{**overrides, "enable_prefix_caching": True}) as llm:  # type: ignore[arg-type]
        results = _evaluate(harness_model(EngineScorer(llm)), manager, args)
        shape = shape_name(llm.model)
        called = precision(llm.model, llm.engine.info.dtype, llm.engine.info.quant_policy)
        report.notes["engine"] = f"{llm.engine.info.device} {llm.engine.info.dtype}, {llm.engine.info.memory_plan}"
    found = metrics(results)
    print_table(
        ("task", "metric", "value", "±"),
        [(task, metric, f"{value:.4f}", f"{error:.4f}") for task, metric, value, error in found],
    )
    rows = [
        {"workload": task, "shape": shape, "precision": called, "value": value, "unit": metric, "error": error}
        for task, metric, value, error in found
    ]
    report.print_facts()
    report.write(rows)
    return 0


def metrics(results: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """(task, metric, value, standard error) of what the harness returns; the error is 0 where it knows none."""
    found = []
    for task, figures in results["results"].items():
        for name, value in figures.items():
            metric, comma, kind = name.partition(",")
            if isinstance(value, (int, float)) and comma and not metric.endswith(ERROR_SUFFIX):
                error = figures.get(f"{metric}{ERROR_SUFFIX},{kind}")
                found.append((task, name, float(value), float(error) if isinstance(error, (int, float)) else 0.0))
    return found


def _task_manager(args: argparse.Namespace) -> Any:
    """What knows the tasks. Raises ConfigError for one that it does not."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=args.include_path)
    unknown = [task for task in args.tasks.split(",") if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"--tasks: lm-eval knows no {unknown[0]!r}; `lm-eval ls tasks` lists its own")
    return manager


def _evaluate(model: Any, manager: Any, args: argparse.Namespace) -> dict[str, Any]:
    import lm_eval

    try:
        results: Any = lm_eval.simple_evaluate(
            model=model, tasks=args.tasks.split(","), num_fewshot=args.num_fewshot, limit=args.limit,
            task_manager=manager, apply_chat_template=args.apply_chat_template, log_samples=False, bootstrap_iters=1000,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError) as error:
        raise ConfigError(
            f"the data of {args.tasks} is not on this machine ({str(error).splitlines()[0]}): fetch it before, or give "
            "--allow-downloads"
        ) from error
    return dict(results)
