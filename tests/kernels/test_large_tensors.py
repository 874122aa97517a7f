"""Tensors of more elements than an int32 counts, as the caches and logits of large cards are: addresses are in int64.

A kernel must give what it gives where the same values lie in a small tensor. The interpreter has the kernels' own
types, and the system gives memory for what is touched alone.
"""

import numpy as np
import pytest
import torch

from tests.kernels.kernel_cases import Target
from tritonmind.kernels import (
    TokenScales,
    edit_logits,
    gather_rows,
    mask_tokens,
    mask_words,
    paged_decode_attention,
    paged_prefill_attention,
    plan_flat_pages,
    rotary_kv_write,
)

TOO_MANY = 2**31
PAGE = (2, 64, 64)  # KV heads, tokens, head_dim
LAST = TOO_MANY // (2 * 64 * 64) + 1  # a page that begins beyond
CONTEXT_LEN = 70


@pytest.fixture
def kernels(target: Target) -> Target:
    """Those of Triton, in one type."""
    if not target.triton or target.dtype != torch.float16:
        pytest.skip("of the kernels, whose addresses do not depend on the type")
    return target


def sparse(target: Target, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Zeros."""
    if target.device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=target.device)
    try:
        return torch.from_numpy(np.zeros(shape, torch.zeros(1, dtype=dtype).numpy().dtype))
    except MemoryError:
        pytest.skip("the system promises no memory of this size")


def ints(target: Target, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=target.device)


def far(target: Target, near: torch.Tensor, last: int) -> torch.Tensor:
    """A pool of which the first and the last page are the two pages of `near`."""
    pool = sparse(target, last + 1, *near.shape[1:], dtype=near.dtype)
    pool[0], pool[last] = near
    return pool


def test_attention(kernels: Target) -> None:
    near, q = kernels.randn(2, *PAGE), kernels.randn(3, 4, 64)
    starts, lens = ints(kernels, 0, 3), ints(kernels, CONTEXT_LEN)

    def attend(pool: torch.Tensor, second: int) -> list[torch.Tensor]:
        tables = ints(kernels, 0, second).view(1, 2)
        return [
            paged_decode_attention(q[:1], pool, pool, tables, lens, softmax_scale=0.1),
            paged_prefill_attention(q, pool, pool, tables, starts, lens, max_query_len=3, softmax_scale=0.1),
        ]

    assert all(map(torch.equal, attend(far(kernels, near, LAST), LAST), attend(near, 1)))


def test_attention_over_int8_pages(kernels: Target) -> None:
    near = torch.randint(0, 256, (2, *PAGE), dtype=torch.uint8, device=kernels.device)
    near_scales, q = torch.rand(2, *PAGE[:2], device=kernels.device), kernels.randn(3, 4, 64)
    starts, lens = ints(kernels, 0, 3), ints(kernels, CONTEXT_LEN)

    def attend(pool: torch.Tensor, scale: torch.Tensor, second: int) -> list[torch.Tensor]:
        tables, scales = ints(kernels, 0, second).view(1, 2), TokenScales(scale, scale)
        scratch = (torch.zeros(2, *PAGE, dtype=q.dtype, device=q.device) for _ in range(2))
        flat = plan_flat_pages(*scratch, tables, starts, lens, lens=[(3, CONTEXT_LEN)], num_tokens=3)
        return [
            paged_decode_attention(q[:1], pool, pool, tables, lens, softmax_scale=0.1, scales=scales),
            paged_prefill_attention(
                q, pool, pool, tables, starts, lens, max_query_len=3, softmax_scale=0.1, scales=scales, flat=flat
            ),
        ]

    last = 2 * LAST  # pairs of bytes are read
    found = attend(far(kernels, near, last), far(kernels, near_scales, last), last)
    assert all(map(torch.equal, found, attend(near, near_scales, 1)))


@pytest.mark.parametrize("int8", [False, True])
def test_written_keys_and_values(kernels: Target, int8: bool) -> None:
    qkv, angles = kernels.randn(1, 8 * 64), torch.rand(1, 64, device=kernels.device)

    def last_page(num_pages: int) -> list[torch.Tensor]:
        """What a token leaves of each pool's last page."""
        stored = torch.uint8 if int8 else kernels.dtype
        pools = [sparse(kernels, num_pages, *PAGE, dtype=stored) for _ in range(2)]
        scales = [sparse(kernels, num_pages, *PAGE[:2], dtype=torch.float32) for _ in range(2)]
        slot = ints(kernels, 64 * (num_pages - 1) + 5)
        rotary_kv_write(
            qkv, angles, ints(kernels, 0), slot, *pools, num_heads=4, num_kv_heads=2, head_dim=64,
            scales=TokenScales(*scales) if int8 else None,
        )  # fmt: skip
        return [pool[-1].clone() for pool in (*pools, *scales)]

    near = last_page(2)
    assert near[0].any() and near[1].any() and all(map(torch.equal, last_page(LAST + 1), near))


def test_rows(kernels: Target) -> None:
    near = kernels.randn(2, 128)
    last = TOO_MANY // 128 + 1
    table = sparse(kernels, last + 1, 128)
    table[last] = near[1]
    assert torch.equal(gather_rows(table, ints(kernels, last, 0))[0], near[1])


def test_logits(kernels: Target) -> None:
    vocab_size = 128256
    num_rows = TOO_MANY // vocab_size + 2
    logits, row = sparse(kernels, num_rows, vocab_size), ints(kernels, num_rows - 1)
    masks = torch.full((1, mask_words(vocab_size)), -1, dtype=torch.int32, device=kernels.device)
    masks[0, 0] = -1 << 7
    mask_tokens(logits, row, masks)
    slots = torch.zeros(num_rows, dtype=torch.int32, device=kernels.device)
    bias = torch.full((1,), 2.5, device=kernels.device)
    edit_logits(logits, row, ints(kernels, 9), bias, ints(kernels, -1), slots, slots[:1].long())
    expected = torch.zeros(16, dtype=logits.dtype, device=logits.device)
    expected[:7], expected[9] = -torch.inf, 2.5
    assert torch.equal(logits[-1, :16], expected)
