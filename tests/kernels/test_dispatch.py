"""Which implementation runs, and what importing the kernels needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.kernel_cases import Target, make_pages
from tritonmind.kernels import paged_decode_attention
from tritonmind.kernels.dispatch import force_triton, use_triton

ROOT = Path(__file__).parents[2]


def test_importing_and_running_on_the_cpu_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from tritonmind.kernels import silu_mul\n"
        "assert silu_mul(torch.ones(1, 4)).shape == (1, 2)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "backend")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


def test_force_triton_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), force_triton():
        pass
    assert not use_triton(torch.empty(1))


def test_force_triton_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with force_triton():
        assert use_triton(torch.empty(1))
    assert not use_triton(torch.empty(1))


def test_limits_of_the_kernels_do_not_bind_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 4 tokens and heads of 160 are for the CPU only, and the message says so."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    target = Target(False, "cpu", torch.float32)
    for block_size, head_dim, message in ((4, 64, "block_size 4"), (16, 160, "head_dim 160")):
        pages = make_pages([9], num_kv_heads=1, head_dim=head_dim, block_size=block_size, target=target)
        q = target.randn(1, 2, head_dim)
        assert paged_decode_attention(q, *pages, softmax_scale=0.1).isfinite().all()
        with force_triton(), pytest.raises(ValueError, match=message):
            paged_decode_attention(q, *pages, softmax_scale=0.1)
