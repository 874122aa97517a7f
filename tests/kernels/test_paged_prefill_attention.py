"""Prefill attention over pages: whole prompts, chunks after a context, several sequences."""

import pytest
import torch

from tests.kernels.kernel_cases import Target, make_pages
from tests.tolerances import assert_vectors_close
from tritonmind.kernels import paged_decode_attention, paged_prefill_attention, reference

# (num_heads, num_kv_heads, head_dim): groups of 1 to 7 heads, head_dims that are no power of two, and a small one.
HEADS = [(2, 2, 64), (3, 1, 64), (4, 1, 80), (7, 1, 96), (4, 1, 128), (4, 2, 8)]
LARGE_HEADS = [(32, 32, 128), (32, 8, 128), (28, 4, 128), (9, 3, 64), (40, 40, 80), (24, 1, 96)]


def check(
    heads: tuple[int, int, int],
    query_lens: list[int],
    context_lens: list[int],
    target: Target,
    *,
    block_size: int = 16,
    num_before: int = 0,
    num_padding: int = 0,
    window: int = 0,
) -> None:
    """num_before: rows of others, which stay. `num_padding` rows follow the last sequence: nobody's business."""
    num_heads, num_kv_heads, head_dim = heads
    pages = make_pages(context_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, target=target)
    starts = torch.tensor([num_before, *query_lens]).cumsum(0).to(torch.int32)
    num_tokens, scale = num_before + sum(query_lens), head_dim**-0.5
    q = 2 * target.randn(num_tokens + num_padding, num_heads, head_dim)
    out = torch.full_like(q, float("nan"))
    result = paged_prefill_attention(
        q,
        pages.k_cache,
        pages.v_cache,
        pages.block_tables,
        starts.to(target.device),
        pages.context_lens,
        max_query_len=max(query_lens),
        softmax_scale=scale,
        window=window,
        out=out,
    )
    assert result is out
    k_cache, v_cache, block_tables, lengths = (tensor.cpu() for tensor in pages)
    expected = reference.paged_prefill_attention(
        q.cpu().float(), k_cache.float(), v_cache.float(), block_tables, starts, lengths, softmax_scale=scale,
        window=window,
    )  # fmt: skip
    assert out[:num_before].isnan().all()
    assert_vectors_close(out[num_before:num_tokens], expected[num_before:num_tokens], target.dtype)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prompt_and_chunk(heads: tuple[int, int, int], target: Target) -> None:
    check(heads, [5, 13], [5, 45], target)


@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [([1], [1]), ([1, 1], [16, 33]), ([17], [17]), ([40], [70]), ([3, 0, 20], [3, 9, 20]), ([70], [130])],
    ids=str,
)
def test_lengths(query_lens: list[int], context_lens: list[int], target: Target) -> None:
    check((2, 1, 64), query_lens, context_lens, target)


def test_padding_rows(target: Target) -> None:
    """Decodes before the prompts, sequences of nobody after them, and rows of nobody."""
    check((2, 1, 64), [4, 6, 0, 0], [4, 30, 0, 0], target, num_before=21, num_padding=37)


def test_pages_larger_than_a_tile(target: Target) -> None:
    check((2, 1, 64), [9, 20], [140, 20], target, block_size=128)


@pytest.mark.parametrize("window", [1, 16, 40])
def test_window(window: int, target: Target) -> None:
    """Shorter than a tile, of whole tiles, across their borders, longer than some sequences."""
    check((2, 1, 64), [40, 20, 3], [75, 20, 60], target, window=window)


def test_window_over_many_query_tiles(target: Target) -> None:
    check((2, 1, 64), [300], [330], Target(False, "cpu", target.dtype) if target.device == "cpu" else target, window=37)


@pytest.mark.parametrize("window", [100, 1024])
@pytest.mark.parametrize("heads", [(32, 8, 128), (28, 4, 128), (9, 3, 64), (40, 40, 80)], ids=str)
def test_large_windows(heads: tuple[int, int, int], window: int, gpu_target: Target) -> None:
    """Those of many queries too, which without a window have a kernel of their own."""
    check(heads, [257, 1, 64, 0, 500], [257, 300, 64, 10, 1777], gpu_target, block_size=64, window=window)
    check(heads, [1700, 7], [2750, 2000], gpu_target, block_size=64, window=window, num_padding=3)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("heads", LARGE_HEADS, ids=str)
def test_large(heads: tuple[int, int, int], block_size: int, gpu_target: Target) -> None:
    check(heads, [257, 1, 64, 0, 500], [257, 300, 64, 10, 1777], gpu_target, block_size=block_size)
    check(heads, [50, 3], [50, 1000], gpu_target, block_size=block_size)
    lengths = [9, 300, *[0] * 30]
    check(heads, lengths, lengths, gpu_target, block_size=block_size, num_before=250, num_padding=81)
    check(heads, [7, 16], [700, 16], gpu_target, block_size=block_size)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("heads", LARGE_HEADS, ids=str)
def test_long_runs(heads: tuple[int, int, int], block_size: int, gpu_target: Target) -> None:
    """Which have a kernel of their own on Hopper: with a context, beside short ones, empty ones and padding."""
    query_lens, context_lens = [1700, 1, 64, 0, 300, 128], [2750, 300, 64, 10, 777, 128]
    check(heads, query_lens, context_lens, gpu_target, block_size=block_size, num_before=200, num_padding=3)
    check(heads, [2048], [2048], gpu_target, block_size=block_size)


def test_query_of_one_equals_decode(target: Target) -> None:
    """The two kernels are one function where they meet."""
    pages = make_pages([37, 20], num_kv_heads=1, head_dim=64, block_size=16, target=target)
    q = target.randn(2, 3, 64)
    prefill = paged_prefill_attention(
        q,
        pages.k_cache,
        pages.v_cache,
        pages.block_tables,
        torch.arange(3, dtype=torch.int32, device=target.device),
        pages.context_lens,
        max_query_len=1,
        softmax_scale=0.125,
    )
    assert_vectors_close(prefill, paged_decode_attention(q, *pages, softmax_scale=0.125).cpu(), target.dtype)


def test_sequence_does_not_depend_on_the_batch(target: Target) -> None:
    """Bit for bit, as long as max_query_len chooses the same tile."""
    pages = make_pages([20, 45], num_kv_heads=1, head_dim=64, block_size=16, target=target)
    q = target.randn(32, 3, 64)
    starts = torch.tensor([0, 18, 32], dtype=torch.int32, device=target.device)
    both = paged_prefill_attention(
        q, pages.k_cache, pages.v_cache, pages.block_tables, starts, pages.context_lens, max_query_len=18,
        softmax_scale=0.125,
    )  # fmt: skip
    alone = paged_prefill_attention(
        q[18:], pages.k_cache, pages.v_cache, pages.block_tables[1:], starts[1:] - 18, pages.context_lens[1:],
        max_query_len=18, softmax_scale=0.125,
    )  # fmt: skip
    assert torch.equal(alone, both[18:])


def test_arguments_are_checked() -> None:
    target = Target(False, "cpu", torch.float32)
    pages = make_pages([5, 9], num_kv_heads=2, head_dim=64, block_size=16, target=target)
    starts = torch.tensor([0, 2, 4], dtype=torch.int32)
    q = target.randn(4, 4, 64)
    pools = (pages.k_cache, pages.v_cache, pages.block_tables)
    with pytest.raises(ValueError, match="cu_seqlens_q has shape"):
        paged_prefill_attention(q, *pools, starts[:2], pages.context_lens, max_query_len=2, softmax_scale=1.0)
    with pytest.raises(ValueError, match="cu_seqlens_q has dtype"):
        paged_prefill_attention(q, *pools, starts.long(), pages.context_lens, max_query_len=2, softmax_scale=1.0)
    with pytest.raises(ValueError, match="max_query_len is 0"):
        paged_prefill_attention(q, *pools, starts, pages.context_lens, max_query_len=0, softmax_scale=1.0)
