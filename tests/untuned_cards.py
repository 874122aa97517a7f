"""Cards without a file of tiles, which a test may have in place of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tritonmind.kernels import tuning
from tritonmind.kernels.tile_table import Card


@pytest.fixture(
    params=[Card("H100", (9, 0), 132), Card("A100", (8, 0), 108), Card("L4", (8, 9), 58)], ids=lambda card: card.name
)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """Pretend that the GPU is this card, which has no file of tiles."""
    monkeypatch.setattr(tuning, "card", lambda device: request.param)
    monkeypatch.setattr(tuning, "SHIPPED", Path("nowhere"))
    tuning.tile.cache_clear()
    yield request.param
    tuning.tile.cache_clear()
