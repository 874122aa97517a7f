"""Decode attention over pages, split and unsplit."""

import pytest
import torch

from tests.kernels.kernel_cases import Pages, Target, make_pages
from tests.tolerances import assert_close
from tritonmind.kernels import paged_decode_attention, reference

# (num_heads, num_kv_heads, head_dim): groups of 1, 3, 4, 7 and 20 heads, head_dims that are no power of two.
HEADS = [(2, 2, 64), (9, 3, 64), (4, 1, 80), (7, 1, 96), (8, 2, 128), (20, 1, 64)]
LARGE_HEADS = [(32, 32, 128), (32, 8, 128), (28, 4, 128), (9, 3, 64), (40, 40, 80), (24, 1, 96)]
# No context, one token, a partial first page, an exact page, a partial last page.
CONTEXT_LENS = [0, 1, 7, 32, 75]


def reference_of(q: torch.Tensor, pages: Pages, softmax_scale: float) -> torch.Tensor:
    k_cache, v_cache, block_tables, context_lens = (tensor.cpu() for tensor in pages)
    return reference.paged_decode_attention(
        q.cpu().float(), k_cache.float(), v_cache.float(), block_tables, context_lens, softmax_scale=softmax_scale
    )


def check(
    heads: tuple[int, int, int], context_lens: list[int], target: Target, *, block_size: int, num_splits: int
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    pages = make_pages(context_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, target=target)
    q = 2 * target.randn(len(context_lens), num_heads, head_dim)
    out = torch.full_like(q, float("nan"))
    scale = head_dim**-0.5
    assert paged_decode_attention(q, *pages, softmax_scale=scale, num_splits=num_splits, out=out) is out
    assert_close(out, reference_of(q, pages, scale), target.dtype)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode(heads: tuple[int, int, int], num_splits: int, target: Target) -> None:
    if num_splits > 1 and not target.triton:
        pytest.skip("the CPU path does not split")
    check(heads, CONTEXT_LENS, target, block_size=32, num_splits=num_splits)


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_block_sizes(block_size: int, target: Target) -> None:
    check((6, 2, 64), [3, block_size, 2 * block_size + 9], target, block_size=block_size, num_splits=0)


def test_more_splits_than_tiles(target: Target) -> None:
    check((3, 1, 64), [0, 20, 70], target, block_size=16, num_splits=8)


@pytest.mark.parametrize("num_splits", [0, 1, 4, 16])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("heads", LARGE_HEADS, ids=str)
def test_large(heads: tuple[int, int, int], block_size: int, num_splits: int, gpu_target: Target) -> None:
    check(heads, [1, 2047, 0, 64, 333, 4096, 129], gpu_target, block_size=block_size, num_splits=num_splits)


def test_long_context(gpu_target: Target) -> None:
    check((32, 8, 128), [32000], gpu_target, block_size=64, num_splits=0)


def test_row_does_not_depend_on_the_batch(target: Target) -> None:
    """Bit for bit in the kernel, at a given number of splits, whatever shares the batch and however wide the table."""
    pages = make_pages([40, 75, 1, 64], num_kv_heads=3, head_dim=64, block_size=32, target=target, spare_columns=3)
    q = target.randn(4, 9, 64)
    batch = paged_decode_attention(q, *pages, softmax_scale=0.125, num_splits=2)
    for row in range(4):
        table = pages.block_tables[row : row + 1, : -(-int(pages.context_lens[row]) // 32)].contiguous()
        alone = paged_decode_attention(
            q[row : row + 1],
            pages.k_cache,
            pages.v_cache,
            table,
            pages.context_lens[row : row + 1],
            softmax_scale=0.125,
            num_splits=2,
        )
        if target.triton:
            assert torch.equal(alone[0], batch[row])
        else:
            assert_close(alone[0], batch[row])


def test_strided_block_tables(target: Target) -> None:
    """A prefix of the columns of a wider table, which is how the engine keeps it."""
    pages = make_pages([40, 20], num_kv_heads=1, head_dim=64, block_size=16, target=target, spare_columns=6)
    q = target.randn(2, 2, 64)
    narrow = pages._replace(block_tables=pages.block_tables[:, :3])
    assert not narrow.block_tables.is_contiguous()
    assert_close(paged_decode_attention(q, *narrow, softmax_scale=0.2), reference_of(q, pages, 0.2), target.dtype)


def test_ragged_batch_on_the_cpu() -> None:
    """More pages than the CPU path gathers at a time: groups of rows by length, out of order."""
    target = Target(False, "cpu", torch.float32)
    check((8, 4, 64), [700, 3, 64, 0, 650, 65, 700, 1200, 1, 129, 64], target, block_size=64, num_splits=0)


def test_large_scores_do_not_overflow(target: Target) -> None:
    pages = make_pages([50], num_kv_heads=1, head_dim=64, block_size=16, target=target)
    q = 100 * target.randn(1, 1, 64)
    assert_close(paged_decode_attention(q, *pages, softmax_scale=1.0), reference_of(q, pages, 1.0), target.dtype)


def test_empty_batch(target: Target) -> None:
    pages = make_pages([5], num_kv_heads=1, head_dim=64, block_size=16, target=target)
    empty = pages._replace(block_tables=pages.block_tables[:0], context_lens=pages.context_lens[:0])
    assert paged_decode_attention(target.randn(0, 2, 64), *empty, softmax_scale=1.0).shape == (0, 2, 64)


def test_arguments_are_checked() -> None:
    target = Target(False, "cpu", torch.float32)
    pages = make_pages([5, 9], num_kv_heads=2, head_dim=64, block_size=16, target=target)
    q = target.randn(2, 4, 64)
    wrong_pages = {
        "k_cache has dtype": {"k_cache": pages.k_cache.half()},
        "v_cache has shape": {"v_cache": pages.v_cache[:1]},
        "block_tables has dtype": {"block_tables": pages.block_tables.long()},
        "block_tables has 1 rows": {"block_tables": pages.block_tables[:1]},
        "block_tables has strides": {"block_tables": pages.block_tables.t().contiguous().t()},
        "context_lens has dtype": {"context_lens": pages.context_lens.long()},
    }
    for message, change in wrong_pages.items():
        with pytest.raises(ValueError, match=message):
            paged_decode_attention(q, *pages._replace(**change), softmax_scale=1.0)
    for message, wrong_q in {
        "q has shape": target.randn(2, 3, 64),
        "q has 3 rows": target.randn(3, 4, 64),
        "q with strides .* is not contiguous": target.randn(2, 4, 128)[:, :, :64],
        "to match k_cache": target.randn(2, 4, 32),
    }.items():
        with pytest.raises(ValueError, match=message):
            paged_decode_attention(wrong_q, *pages, softmax_scale=1.0)
