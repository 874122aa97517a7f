"""Decode attention over pages, split and unsplit."""

import pytest
import torch

from tests.kernels.kernel_cases import Pages, Target, make_pages
from tests.tolerances import assert_vectors_close
from tritonmind.kernels import DecodePlan, paged_decode_attention, plan_decode, reference

# (num_heads, num_kv_heads, head_dim): groups of 1 to 20 heads, head_dims that are no power of two, and a small one.
HEADS = [(2, 2, 64), (9, 3, 64), (4, 1, 80), (7, 1, 96), (8, 2, 128), (20, 1, 64), (4, 2, 8)]
LARGE_HEADS = [(32, 32, 128), (32, 8, 128), (28, 4, 128), (9, 3, 64), (40, 40, 80), (24, 1, 96)]
# No context, one token, a partial first page, an exact page, a partial last page.
CONTEXT_LENS = [0, 1, 7, 32, 75]


def reference_of(q: torch.Tensor, pages: Pages, softmax_scale: float, window: int = 0) -> torch.Tensor:
    k_cache, v_cache, block_tables, context_lens = (tensor.cpu() for tensor in pages)
    return reference.paged_decode_attention(
        q.cpu().float(), k_cache.float(), v_cache.float(), block_tables, context_lens, softmax_scale=softmax_scale,
        window=window,
    )  # fmt: skip


def plan_of(q: torch.Tensor, pages: Pages, num_programs: int, window: int = 0) -> DecodePlan | None:
    return plan_decode(
        pages.context_lens,
        num_heads=q.shape[1],
        num_kv_heads=pages.k_cache.shape[1],
        head_dim=q.shape[2],
        block_size=pages.k_cache.shape[2],
        dtype=q.dtype,
        window=window,
        num_programs=num_programs,
    )


def pieces_of(plan: DecodePlan | None) -> list[tuple[int, int, int, int]]:
    """Sequence, index, number of pieces and context_len of each piece."""
    assert plan is not None
    rows = [tuple(row) for row in plan.pieces.tolist()]
    used = [row for row in rows if row[0] >= 0]
    assert rows[: len(used)] == used
    return used


def check(
    heads: tuple[int, int, int], context_lens: list[int], target: Target, *, block_size: int, num_programs: int = 0,
    window: int = 0,
) -> None:  # fmt: skip
    """num_programs: that share the work, 0 for as many as the launcher chooses."""
    num_heads, num_kv_heads, head_dim = heads
    pages = make_pages(context_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, target=target)
    q = 2 * target.randn(len(context_lens), num_heads, head_dim)
    out = torch.full_like(q, float("nan"))
    scale = head_dim**-0.5
    plan = plan_of(q, pages, num_programs, window) if num_programs else None
    assert paged_decode_attention(q, *pages, softmax_scale=scale, window=window, plan=plan, out=out) is out
    assert_vectors_close(out, reference_of(q, pages, scale, window), target.dtype)


@pytest.mark.parametrize("num_programs", [1, 40])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode(heads: tuple[int, int, int], num_programs: int, target: Target) -> None:
    """Whole sequences, and pieces of one tile."""
    if num_programs > 1 and not target.triton:
        pytest.skip("the CPU path has no pieces")
    check(heads, CONTEXT_LENS, target, block_size=32, num_programs=num_programs)


@pytest.mark.parametrize("window", [1, 32, 40])
@pytest.mark.parametrize("num_programs", [1, 40])
def test_window(window: int, num_programs: int, target: Target) -> None:
    """Of one tile and of several, in one piece and in many."""
    if num_programs > 1 and not target.triton:
        pytest.skip("the CPU path has no pieces")
    lens = [*CONTEXT_LENS, 130]
    check((6, 2, 64), lens, target, block_size=16, num_programs=num_programs, window=window)


@pytest.mark.parametrize("num_programs", [0, 5000])
@pytest.mark.parametrize("heads", [(32, 8, 128), (28, 4, 128), (9, 3, 64)], ids=str)
def test_large_windows(heads: tuple[int, int, int], num_programs: int, gpu_target: Target) -> None:
    lens = [1, 2047, 0, 64, 333, 4096, 20000]
    check(heads, lens, gpu_target, block_size=64, num_programs=num_programs, window=1000)


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_block_sizes(block_size: int, target: Target) -> None:
    check((6, 2, 64), [3, block_size, 2 * block_size + 9], target, block_size=block_size)


@pytest.mark.parametrize(("num_short", "num_programs"), [(2, 1000), (9, 40)], ids=["kernel", "last program"])
def test_many_pieces(num_short: int, num_programs: int, target: Target) -> None:
    """More than are added up together, by a kernel of their own or by the program that ends last."""
    if not target.triton:
        pytest.skip("the CPU path has no pieces")
    check((4, 1, 128), [300, *[17] * num_short, 0], target, block_size=16, num_programs=num_programs)


@pytest.mark.parametrize("num_programs", [0, 1, 500, 5000])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("heads", LARGE_HEADS, ids=str)
def test_large(heads: tuple[int, int, int], block_size: int, num_programs: int, gpu_target: Target) -> None:
    check(heads, [1, 2047, 0, 64, 333, 4096, 129], gpu_target, block_size=block_size, num_programs=num_programs)


def test_large_batch(gpu_target: Target) -> None:
    """More sequences than the plan looks at together, one of them long."""
    context_lens = [20000, *torch.randint(0, 400, (599,)).tolist()]
    check((8, 2, 128), context_lens, gpu_target, block_size=64)


def test_long_context(gpu_target: Target) -> None:
    check((32, 8, 128), [32000], gpu_target, block_size=64)


def test_row_does_not_depend_on_the_batch(target: Target) -> None:
    """Bit for bit in the kernel while sequences are whole, whatever shares the batch and however wide the table."""
    pages = make_pages([40, 75, 1, 64], num_kv_heads=3, head_dim=64, block_size=32, target=target, spare_columns=3)
    q = target.randn(4, 9, 64)
    batch = paged_decode_attention(q, *pages, softmax_scale=0.125, plan=plan_of(q, pages, 1))
    for row in range(4):
        one = slice(row, row + 1)
        table = pages.block_tables[one, : -(-int(pages.context_lens[row]) // 32)].contiguous()
        single = pages._replace(block_tables=table, context_lens=pages.context_lens[one])
        alone = paged_decode_attention(q[one], *single, softmax_scale=0.125, plan=plan_of(q[one], single, 1))
        if target.triton:
            assert torch.equal(alone[0], batch[row])
        else:
            assert_vectors_close(alone[0], batch[row])


def test_same_result_each_time(target: Target) -> None:
    """Bit for bit, over and over with one plan: which program ends last changes, the order of the sum does not."""
    pages = make_pages([300, 45, 0, 130], num_kv_heads=2, head_dim=64, block_size=16, target=target)
    q = target.randn(4, 8, 64)
    plan = plan_of(q, pages, 50)
    first = paged_decode_attention(q, *pages, softmax_scale=0.125, plan=plan)
    for _ in range(20 if target.device == "cuda" else 2):
        assert torch.equal(paged_decode_attention(q, *pages, softmax_scale=0.125, plan=plan), first)


def test_plan_covers_every_tile(target: Target) -> None:
    """Each sequence in its number of pieces, about as many as wanted, long pieces first."""
    if not target.triton:
        pytest.skip("the CPU path has no plan")
    context_lens = [0, 16, 800, 17, *torch.randint(0, 200, (300,)).tolist()]
    pages = make_pages(context_lens, num_kv_heads=2, head_dim=64, block_size=16, target=target)
    q = target.randn(len(context_lens), 2, 64)
    num_tiles = [-(-length // 16) for length in context_lens]
    num_wanted = 100
    pieces = pieces_of(plan_of(q, pages, 2 * num_wanted))
    assert sorted(piece[:2] for piece in pieces) == sorted(
        (seq, index) for seq, index, count, _ in {(s, i, c, n) for s, _, c, n in pieces for i in range(c)}
    )
    assert {piece[0] for piece in pieces} == set(range(len(context_lens)))
    assert all(context_lens[seq] == length for seq, _, _, length in pieces)
    assert all(count <= max(1, num_tiles[seq]) for seq, _, count, _ in pieces)
    average = sum(num_tiles) / num_wanted
    assert max(num_tiles[seq] / count for seq, _, count, _ in pieces) <= 1.5 * average + 2
    assert next(count for seq, _, count, _ in pieces if seq == 2) >= 0.5 * num_tiles[2] / average
    lengths = [-(-num_tiles[seq] // count) for seq, _, count, _ in pieces]
    is_short = [2 * length < max(lengths) for length in lengths]
    assert is_short == sorted(is_short) and any(is_short) and not all(is_short)
    assert not plan_of(q, pages, 2 * num_wanted).arrivals.any()


def test_pieces_are_not_short(target: Target) -> None:
    """However few sequences there are: pieces of a few tokens cost more than they save."""
    if not target.triton:
        pytest.skip("the CPU path has no plan")
    pages = make_pages([64, 180, 1], num_kv_heads=1, head_dim=64, block_size=64, target=target)
    plan = plan_decode(pages.context_lens, num_heads=1, num_kv_heads=1, head_dim=64, block_size=64, dtype=target.dtype)
    assert all(count == 1 or length / count >= 85 for _, _, count, length in pieces_of(plan))


def test_plan_of_another_batch(target: Target) -> None:
    if not target.triton:
        pytest.skip("the CPU path has no plan")
    pages = make_pages([40, 20], num_kv_heads=1, head_dim=64, block_size=16, target=target)
    q = target.randn(2, 2, 64)
    one = pages._replace(context_lens=pages.context_lens[:1])
    with pytest.raises(ValueError, match="plan is for 1 sequences"):
        paged_decode_attention(q, *pages, softmax_scale=1.0, plan=plan_of(q, one, 1))
    with pytest.raises(ValueError, match="plan is for 2 sequences with 1 KV heads"):
        paged_decode_attention(q, *pages, softmax_scale=1.0, plan=plan_of(target.randn(2, 4, 64), pages, 1))


def test_strided_block_tables(target: Target) -> None:
    """A prefix of the columns of a wider table, which is how the engine keeps it."""
    pages = make_pages([40, 20], num_kv_heads=1, head_dim=64, block_size=16, target=target, spare_columns=6)
    q = target.randn(2, 2, 64)
    narrow = pages._replace(block_tables=pages.block_tables[:, :3])
    assert not narrow.block_tables.is_contiguous()
    assert_vectors_close(
        paged_decode_attention(q, *narrow, softmax_scale=0.2), reference_of(q, pages, 0.2), target.dtype
    )


def test_ragged_batch_on_the_cpu() -> None:
    """More pages than the CPU path gathers at a time: groups of rows by length, out of order."""
    target = Target(False, "cpu", torch.float32)
    check((8, 4, 64), [700, 3, 64, 0, 650, 65, 700, 1200, 1, 129, 64], target, block_size=64)


def test_large_scores_do_not_overflow(target: Target) -> None:
    pages = make_pages([50], num_kv_heads=1, head_dim=64, block_size=16, target=target)
    q = 100 * target.randn(1, 1, 64)
    # Scores of a thousand are rounded to 1e-4 in fp32, and so are the powers of e.
    out, expected = paged_decode_attention(q, *pages, softmax_scale=1.0), reference_of(q, pages, 1.0)
    if target.dtype == torch.float32:
        torch.testing.assert_close(
            out.double().cpu(), expected.double(), rtol=0, atol=1e-3 * float(expected.square().mean().sqrt())
        )
    else:
        assert_vectors_close(out, expected, target.dtype)


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
