"""For every test: the Triton interpreter where there is no GPU, poisoned allocations, a printed seed."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads it when a kernel is decorated, so it must be set before a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
SEED = int(os.environ.get("TRITONMIND_TEST_SEED", random.randrange(2**31)))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; deselected without one or under TRITON_INTERPRET=1")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed {SEED} (TRITONMIND_TEST_SEED={SEED} repeats it); gpu tests {'on' if HAS_GPU else 'deselected'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    kept = [item for item in items if item.get_closest_marker("gpu") is None]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu") is not None])
    items[:] = kept


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch and random before each test, so that a test gives the same alone as in the whole run."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "tritonmind" and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True, scope="session")
def poisoned_allocations() -> Iterator[None]:
    """Uninitialised memory of the package is NaN: what a kernel forgets to write shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _poisoned(torch.empty))
        patch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
        yield


@pytest.fixture(scope="session")
def smollm2_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, converted once for all tests; half a minute."""
    # Imported here: it imports Transformers, which many tests do without.
    from tests.workspaces import convert_smollm2

    return convert_smollm2(tmp_path_factory.mktemp("demo"))
