"""`tritonmind bench` with 4-bit weights: how they are asked for, what rows call them, and what their roofline is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from tritonmind.errors import ConfigError
from tritonmind.model_source import open_model
from tritonmind_tools.bench import static
from tritonmind_tools.bench.kernel_case import Point, Setting
from tritonmind_tools.bench.kernel_cases import KERNELS
from tritonmind_tools.bench.options import engine_overrides, model_path
from tritonmind_tools.bench.report import precision
from tritonmind_tools.bench.roofline import weight_bytes
from tritonmind_tools.bench.shapes import SHAPES
from tritonmind_tools.bench.tune_cases import Task, tasks
from tritonmind_tools.cli import build_parser, main

LINEAR_WEIGHTS = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def options(**given: object) -> argparse.Namespace:
    defaults = {"workspace": None, "shape": None, "dtype": "int4", "num_threads": 0, "engine_options": []}
    return argparse.Namespace(**defaults | given)


def test_the_weights_stand_in_the_name_of_the_model() -> None:
    """The engine's own dtype stays open."""
    assert model_path(options(shape="llama2-7b")) == "random:llama2-7b:int4"
    assert model_path(options(shape="llama2-7b", dtype="bf16")) == "random:llama2-7b"
    assert engine_overrides(options(shape="tiny"))["dtype"] == "auto"
    with pytest.raises(ConfigError, match="--dtype=int4 is for random weights, with --shape: a workspace has the"):
        model_path(options(workspace="workspace"))
    with pytest.raises(SystemExit):
        main(["bench", "kernels", "--dtype", "int4"])  # it has a line for each precision


def test_roofline_and_precision() -> None:
    model = open_model("random:llama2-7b:int4").model
    # As they are stored: 4 bits each, 16 of scale and 4 of zero point for each group of 128.
    assert weight_bytes(model, 2) == LINEAR_WEIGHTS * (4 + 20 / 128) / 8 + 2 * 32000 * 4096
    assert weight_bytes(model, 4) == 4 * (LINEAR_WEIGHTS + 32000 * 4096)
    assert precision(model, "float16") == precision(model, "bfloat16") == "w4"
    assert precision(model, "float32") == "fp32"  # on a CPU they are dequantised
    assert precision(open_model("random:llama2-7b").model, "float16") == "fp16"


def test_work_of_the_kernels() -> None:
    setting = Setting(SHAPES["llama2-7b"], torch.float16, torch.device("cpu"))
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == "w13 w4")
    case = kernel.case(setting, Point(8, 1, 512))
    assert case.num_bytes == 4096 * 22016 * (4 + 20 / 128) / 8 + 2 * 8 * (4096 + 11008)
    assert case.num_flops == 2 * 8 * 4096 * 22016
    assert kernel.can_run(setting) and not kernel.can_run(
        setting._replace(dtype=torch.float32, device=torch.device("cuda"))
    )
    found = tasks(setting, ["w4_linear", "w4_gate_up"])
    assert Task("w4_linear", "w2 w4", (4096, 11008, 128), 64, 64) in found
    assert Task("w4_gate_up", "w13 w4", (11008, 4096, 128), 1, 1) in found


def test_a_sweep_is_planned() -> None:
    args = build_parser().parse_args(["bench", "static", "--shape", "tiny", "--dtype", "int4", "--sweep", "batch"])
    assert [workload.name for workload in static._plan(args).workloads][-1] == "decode_batch256_context256"


def test_a_step_is_measured(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--shape", "tiny", "--dtype", "int4", "--batch-size", "2", "--context", "8", "--steps", "2"]
    assert main(["bench", "profile", *arguments, "--json", str(report)]) == 0
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["shape"], row["precision"]) == ("tiny", "fp32") and row["workload"].startswith("decode step B=2 ")
