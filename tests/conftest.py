"""For every test: the Triton interpreter where there is no GPU, poisoned allocations, a printed seed."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

# Triton reads it when a kernel is decorated, so it must be set before a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
MAX_PROCESSES = 8
# Put into the environment, so that the processes of pytest-xdist have the same.
SEED = int(os.environ.setdefault("TRITONMIND_TEST_SEED", str(random.randrange(2**31))))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; deselected without one or under TRITON_INTERPRET=1")
    if config.getoption("numprocesses", None):
        # For the processes of pytest-xdist and for theirs: threads that wait for each other's cores wait long.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` is: a process a core, each of a gigabyte; on a GPU one, since engines fill its memory."""
    return 0 if HAS_GPU else min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed {SEED} (TRITONMIND_TEST_SEED={SEED} repeats it); gpu tests {'on' if HAS_GPU else 'deselected'}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = [] if HAS_GPU else [item for item in items if item.get_closest_marker("gpu") is not None]
    config.hook.pytest_deselected(items=dropped)
    kept = [item for item in items if HAS_GPU or item.get_closest_marker("gpu") is None]
    items[:] = _long_files_first(kept)


def _long_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Compiling every kernel, then the real servers, then by number of tests: the last file must not be waited for."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def is_short(tests: list[pytest.Item]) -> tuple[bool, bool, int]:
        is_server = any(test.get_closest_marker("server") for test in tests)
        return tests[0].path.name != "test_compile.py", not is_server, -len(tests)

    return [item for tests in sorted(files.values(), key=is_short) for item in tests]


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
    """The demo model, converted once for all tests, in whichever process of pytest-xdist; half a minute."""
    # Imported here: it imports Transformers, which many tests do without.
    from tests.workspaces import convert_smollm2

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(shared / "smollm2.lock"):
        workspace = shared / "smollm2"
        # It is renamed into place when all is there.
        return workspace if workspace.exists() else convert_smollm2(shared)
