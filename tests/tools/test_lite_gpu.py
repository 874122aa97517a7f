"""Calibrating and quantising on a GPU: the numbers of a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tolerances import assert_close
from tests.tools.lite_cases import calibrated, run_calibrate

from tritonmind.kernels.awq_format import AwqWeight, dequantize
from tritonmind_tools.lite.auto_awq import auto_awq

pytestmark = pytest.mark.gpu


def test_a_gpu_finds_what_a_cpu_finds(tmp_path: Path) -> None:
    checkpoint, work_dir, _ = calibrated(
        tmp_path, "--device", "cpu", chats="chats.jsonl", num_kv_heads=4, attention_bias=True
    )
    found: dict[str, list[dict[str, torch.Tensor]]] = {"statistics": [], "weights": []}
    for device in ("cpu", "cuda"):
        if device == "cuda":
            run_calibrate(tmp_path, "--device", "cuda", chats="chats.jsonl")
        statistics: dict[str, torch.Tensor] = {}
        for path in (work_dir / "calibration").glob("*_stats.safetensors"):
            statistics |= load_file(path)
        found["statistics"].append(statistics)
        auto_awq(checkpoint, work_dir, group_size=32, device=device)
        found["weights"].append(load_file(work_dir / "model.safetensors"))

    on_cpu, on_gpu = found["statistics"]
    assert on_cpu.keys() == on_gpu.keys() and on_cpu
    for name, tensor in on_cpu.items():
        assert_close(on_gpu[name], tensor, torch.float16)  # sums in another order, through two layers
    on_cpu, on_gpu = found["weights"]
    modules = [name.removesuffix(".qweight") for name in on_cpu if name.endswith(".qweight")]
    assert len(modules) == 14
    for module in modules:
        cpu, gpu = (
            dequantize(AwqWeight(*(weights[f"{module}.{kind}"] for kind in ("qweight", "qzeros", "scales"))))
            for weights in (on_cpu, on_gpu)
        )
        # Another alpha may win where two are all but as good; the weights are those of one model all the same.
        assert (cpu - gpu).square().mean().sqrt() < 0.3 * cpu.square().mean().sqrt(), module
