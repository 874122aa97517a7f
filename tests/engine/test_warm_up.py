"""What a warm-up runs, without a card; that nothing is compiled after it is tested on one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.untuned_cards import card
from tritonmind.config import QuantPolicy
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.kernels import tuning
from tritonmind.kernels.tile_table import Tile

__all__ = ["card"]

DEVICE = torch.device("cuda")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("window", [40, 1000, 4096])
def test_prompts_within_a_window_and_beyond(window: int) -> None:
    """Both have kernels of their own. A step may have more tokens than the window."""
    longest, max_model_len = 8192, 16384
    steps: list[tuple[int, int]] = []  # query_len, context_len

    def run_padding(num_decodes: int, prefill_lens: list[int], *, num_earlier: int = 0) -> None:
        steps.extend((length, length + num_earlier) for length in prefill_lens)

    runner: Any = SimpleNamespace(
        config=SimpleNamespace(
            scheduler=SimpleNamespace(max_num_batched_tokens=longest, max_num_seqs=64, max_model_len=max_model_len),
            model=SimpleNamespace(num_heads=32, num_kv_heads=8, head_dim=128),
            cache=SimpleNamespace(block_size=64, quant_policy=QuantPolicy.NONE),
        ),
        model=SimpleNamespace(window=window, row_variants=lambda max_tokens, max_samples: []),
        dtype=torch.float16,
        device=DEVICE,
        _run_largest=lambda: longest,
        _run_padding=run_padding,
    )
    ModelRunner._warm_up(runner)

    def tile(query_len: int) -> Tile:
        return tuning.tile(
            "prefill_attention", DEVICE, rows=query_len, head_dim=128, group=4, block_size=64, itemsize=2
        )

    within = {tile(query_len) for query_len, context_len in steps if context_len <= window}
    beyond = {tile(query_len) for query_len, context_len in steps if context_len > window}
    assert within == {tile(query_len) for query_len in range(1, window + 1)}
    assert beyond == {tile(query_len) for query_len in range(1, longest + 1)}
