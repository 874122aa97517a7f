"""Fixtures that run a kernel test once for each implementation."""

import os
from collections.abc import Iterator

import pytest

from tests.kernels.kernel_cases import CPU_TARGETS, GPU_TARGETS, Target
from tritonmind.kernels.dispatch import force_triton

GPU_PARAMS = [pytest.param(target, id=name, marks=pytest.mark.gpu) for name, target in GPU_TARGETS.items()]
CPU_PARAMS = [pytest.param(target, id=name) for name, target in CPU_TARGETS.items()]


@pytest.fixture(params=CPU_PARAMS + GPU_PARAMS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every implementation: the CPU path, the kernels under the interpreter, the kernels on a GPU."""
    chosen: Target = request.param
    if not (chosen.triton and chosen.device == "cpu"):
        yield chosen
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter needs TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    with force_triton():
        yield chosen


@pytest.fixture(params=GPU_PARAMS)
def gpu_target(request: pytest.FixtureRequest) -> Target:
    """The kernels on a GPU, for shapes that the interpreter has no time for."""
    chosen: Target = request.param
    return chosen
