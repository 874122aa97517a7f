"""What a warm-up is told to run covers what dispatch picks, for every size of step."""

from __future__ import annotations

import pytest
import torch

from tests.untuned_cards import card
from tritonmind.kernels import attention_variants, tuning
from tritonmind.kernels.tile_table import Card

__all__ = ["card"]

MAX_SEQS, MAX_QUERY_LEN, NUM_HEADS, HEAD_DIM, BLOCK_SIZE = 256, 4096, 32, 128, 64


@pytest.mark.parametrize("int8_kv", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("num_kv_heads", [32, 8, 4])
def test_every_variant_is_listed(num_kv_heads: int, int8_kv: bool, card: Card) -> None:
    pytest.importorskip("triton")
    from tritonmind.kernels.triton_decode_pieces import adds_up_inside
    from tritonmind.kernels.triton_decode_plan import MAX_OVERSUBSCRIPTION

    group, device = NUM_HEADS // num_kv_heads, torch.device("cuda")
    found = attention_variants(
        MAX_SEQS, MAX_QUERY_LEN, num_heads=NUM_HEADS, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM,
        block_size=BLOCK_SIZE, dtype=torch.float16, device=device, int8_kv=int8_kv,
    )  # fmt: skip
    sizes = {"head_dim": HEAD_DIM, "group": group, "block_size": BLOCK_SIZE}

    def decode(num_seqs: int) -> object:
        tile = tuning.tile("decode_attention", device, rows=num_seqs, **sizes, itemsize=1 if int8_kv else 2)
        wanted = -(-tile.programs_per_sm * card.num_sms // num_kv_heads) * MAX_OVERSUBSCRIPTION
        return tile, adds_up_inside(num_seqs, group, wanted)

    def prefill(query_len: int) -> object:
        return tuning.tile("prefill_attention", device, rows=query_len, **sizes, itemsize=2)

    assert set(map(decode, found.num_decodes)) == set(map(decode, range(1, MAX_SEQS + 1)))
    assert set(map(prefill, found.max_query_lens)) == set(map(prefill, range(1, MAX_QUERY_LEN + 1)))
    assert max(found.num_decodes) == MAX_SEQS and max(found.max_query_lens) == MAX_QUERY_LEN


def test_long_runs_have_their_kernel_on_hopper_only(card: Card) -> None:
    """What a tile of 128 queries means there: pages of whole tiles, and heads that its instructions take."""
    device = torch.device("cuda")

    def block_m(**changes: int) -> int:
        sizes = {"head_dim": 128, "group": 4, "block_size": 64, "itemsize": 2, **changes}
        return tuning.tile("prefill_attention", device, rows=2048, **sizes).block_m

    is_hopper = card.capability == (9, 0)
    assert block_m() == block_m(head_dim=64) == block_m(block_size=128) == 128
    assert block_m(head_dim=96) == block_m(block_size=16) == (64 if is_hopper else 128)
    assert block_m(itemsize=4) == 32


def test_a_cpu_has_one_variant() -> None:
    found = attention_variants(
        5, 70, num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, device=torch.device("cpu")
    )
    assert found == ([5], [70])
