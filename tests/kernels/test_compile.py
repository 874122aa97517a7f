"""Every kernel compiles for an H100 as its launcher asks, without a spill. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
KERNELS = {
    "_rms_norm_kernel",
    "_silu_mul_kernel",
    "_rotary_kv_write_kernel",
    "_decode_kernel",
    "_combine_kernel",
    "_prefill_kernel",
    "_gather_rows_kernel",
    "_score_kernel",
    "_choose_kernel",
    "_logprobs_kernel",
    "_edit_logits_kernel",
    "_write_block_tables_kernel",
    "_prepare_tokens_kernel",
}
# Shared memory a block may have on sm_90.
MAX_SHARED_BYTES = 227 << 10


def test_kernels_compile_without_spills() -> None:
    """In a process of its own: this one's kernels are the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "backend")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert {report["kernel"] for report in reports} == KERNELS
    for report in reports:
        assert report["stack"] == 0 and report["local"] == 0, f"spills: {report}"
        assert report["shared"] <= MAX_SHARED_BYTES, f"too much shared memory: {report}"
