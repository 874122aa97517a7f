"""What a machine can reach is measured in no time where a test measures something else."""

from __future__ import annotations

import pytest

from tritonmind_tools.bench import machine


@pytest.fixture(autouse=True)
def small_measures_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(machine.MATMUL_SIZE, "cpu", 64)
