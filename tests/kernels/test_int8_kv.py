"""The int8 KV cache: written, read by decodes, and flattened for prompts."""

import pytest
import torch

from tests.kernels.kernel_cases import Pages, Target, int8_pages, make_pages, on_cpu
from tests.tolerances import assert_close, assert_vectors_close
from tritonmind.kernels import (
    FlatPages,
    HeadNorms,
    LayerScales,
    TokenScales,
    kv_quant,
    paged_decode_attention,
    paged_prefill_attention,
    plan_decode,
    plan_flat_pages,
    reference,
    rotary_kv_write,
)
from tritonmind.kernels.kv_quant import KVScales

KINDS = ["layer", "token"]
# (num_heads, num_kv_heads, head_dim): groups of 3, 4, 8 and 20 heads, head_dims that are no power of two.
HEADS = [(9, 3, 64), (4, 1, 80), (8, 1, 128), (20, 1, 64)]
LARGE_HEADS = [(32, 32, 128), (32, 8, 128), (32, 4, 128), (9, 3, 64), (40, 40, 80), (24, 1, 96)]
LAYER_SCALES = LayerScales(0.03, 0.4, 0.02, -0.3)


def check_decode(
    heads: tuple[int, int, int], context_lens: list[int], kind: str, target: Target, *, block_size: int,
    num_programs: int = 0, window: int = 0,
) -> None:  # fmt: skip
    num_heads, num_kv_heads, head_dim = heads
    pages, scales = int8_pages(
        make_pages(context_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, target=target),
        kind,
    )
    q = 2 * target.randn(len(context_lens), num_heads, head_dim)
    out = torch.full_like(q, float("nan"))
    plan = plan_decode(
        pages.context_lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size,
        dtype=q.dtype, int8_kv=True, window=window, num_programs=num_programs,
    )  # fmt: skip
    scale = head_dim**-0.5
    result = paged_decode_attention(q, *pages, softmax_scale=scale, window=window, scales=scales, plan=plan, out=out)
    assert result is out
    expected = reference.paged_decode_attention(
        q.cpu().float(), *(tensor.cpu() for tensor in pages), softmax_scale=scale, window=window, scales=on_cpu(scales)
    )
    assert_vectors_close(out, expected, target.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_window(kind: str, target: Target) -> None:
    check_decode((9, 3, 64), [0, 1, 75, 130], kind, target, block_size=16, num_programs=7, window=40)


@pytest.mark.parametrize("kind", KINDS)
def test_large_windows(kind: str, gpu_target: Target) -> None:
    lens = [1, 2047, 0, 64, 333, 4096, 20000]
    check_decode((32, 8, 128), lens, kind, gpu_target, block_size=64, window=1000)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_decode(kind: str, heads: tuple[int, int, int], target: Target) -> None:
    """No context, one token, a partial page, a whole one, several in pieces of a tile."""
    check_decode(heads, [0, 1, 75, 32], kind, target, block_size=32, num_programs=7)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("heads", LARGE_HEADS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_large_decode(kind: str, heads: tuple[int, int, int], block_size: int, gpu_target: Target) -> None:
    """Pieces as the launcher chooses them, none, some that their last program adds up, and many for a kernel."""
    for num_programs in (0, 1, 500, 5000):
        lens = [1, 1023, 0, 64, 333, 1500, 129]
        check_decode(heads, lens, kind, gpu_target, block_size=block_size, num_programs=num_programs)


@pytest.mark.parametrize("kind", KINDS)
def test_large_decode_batches(kind: str, gpu_target: Target) -> None:
    """Hundreds of sequences, one of them long; one of 32k tokens."""
    check_decode((8, 2, 128), [20000, *torch.randint(0, 400, (599,)).tolist()], kind, gpu_target, block_size=64)
    check_decode((32, 8, 128), [32000], kind, gpu_target, block_size=64)


def test_light_tokens_count(target: Target) -> None:
    """Weights far below that of the heaviest token, times a small scale, must not vanish in 16 bits."""
    pages = make_pages([1000], num_kv_heads=1, head_dim=64, block_size=128, target=target)
    pages.k_cache.mul_(0.01)
    pages.k_cache[pages.block_tables[0, 0], 0, 0] = 2.2
    pages.v_cache.mul_(0.01).add_(0.05)
    pages.v_cache[pages.block_tables[0, 0], 0, 0] = -0.02
    stored, scales = int8_pages(pages, "token")
    q = torch.full((1, 1, 64), 0.6).to(target.device, target.dtype)
    out = paged_decode_attention(q, *stored, softmax_scale=0.125, scales=scales)
    expected = reference.paged_decode_attention(
        q.cpu().float(), *(tensor.cpu() for tensor in stored), softmax_scale=0.125, scales=on_cpu(scales)
    )
    assert_vectors_close(out, expected, target.dtype)


def check_write(
    heads: tuple[int, int, int], num_tokens: int, kind: str, target: Target, *, splits: int = 0, block_size: int = 16,
    norm: bool = False,
) -> None:  # fmt: skip
    """Bytes may differ by one where the reference is within rounding of a tie; scales by rounding. No slot but the
    named ones is touched.
    """
    num_heads, num_kv_heads, head_dim = heads
    shape = (-(-num_tokens // block_size) + 2, num_kv_heads, block_size, head_dim)
    slots = torch.randperm(shape[0] * block_size)[:num_tokens].to(torch.int32)
    slots[num_tokens // 2] = -1
    angles = torch.rand(50, head_dim // 2) * 6
    cos_sin, positions = torch.cat((angles.cos(), angles.sin()), dim=1), torch.randint(0, 50, (num_tokens,))
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn(splits, num_tokens, width).to(target.device) if splits else target.randn(num_tokens, width)
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}

    def pools(device: str) -> tuple[torch.Tensor, torch.Tensor, kv_quant.KVScales]:
        values = [torch.full(shape, 7, dtype=torch.uint8, device=device) for _ in range(2)]
        scales = [torch.full(shape[:3], float("nan"), device=device) for _ in range(2)]
        return values[0], values[1], TokenScales(*scales) if kind == "token" else LAYER_SCALES

    k, v, scales = pools(target.device)
    on_device = [tensor.to(target.device) for tensor in (cos_sin, positions, slots)]
    norms = [HeadNorms(*(1 + torch.rand(2, head_dim)).to(target.dtype), 1e-5)] if norm else []
    mine = [HeadNorms(each.q.to(target.device), each.k.to(target.device), each.eps) for each in norms]
    q = rotary_kv_write(
        qkv, *on_device, k, v, **sizes, norms=mine[0] if norm else None, scales=scales, dtype=target.dtype
    )
    expected_k, expected_v, expected_scales = pools("cpu")
    expected = reference.rotary_kv_write(
        qkv.cpu().float(), cos_sin, positions, slots, expected_k, expected_v, **sizes, scales=expected_scales,
        norms=HeadNorms(norms[0].q.float(), norms[0].k.float(), norms[0].eps) if norm else None,
    )  # fmt: skip
    assert q.dtype == target.dtype
    assert_close(q, expected, target.dtype)
    # Partial sums and what is rotated may be rounded to the queries' type before they become bytes.
    slack = {torch.float32: 1e-3, torch.float16: 0.15, torch.bfloat16: 1.0}[target.dtype]
    for name, actual, wanted in (("k", k, expected_k), ("v", v, expected_v)):
        actual = actual.cpu().float()
        if isinstance(scales, TokenScales) and isinstance(expected_scales, TokenScales):
            scale, wanted_scale = getattr(scales, name).cpu(), getattr(expected_scales, name)
            assert torch.equal(scale.isnan(), wanted_scale.isnan()), "scales of other slots than slot_mapping says"
            assert_close(scale[~scale.isnan()], wanted_scale[~scale.isnan()], target.dtype)
        difference = (actual - wanted.float()).abs()
        assert difference.max() <= (1 if target.dtype == torch.float32 else 2)
        assert difference.mean() <= slack
        assert ((actual == 7) == (wanted == 7)).float().mean() > 0.99, "bytes of other slots than slot_mapping says"


@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 1, 80), (8, 2, 128)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_write(kind: str, heads: tuple[int, int, int], target: Target) -> None:
    check_write(heads, 2, kind, target)
    check_write(heads, 5, kind, target)


@pytest.mark.parametrize("kind", KINDS)
def test_write_of_normalised_heads(kind: str, target: Target) -> None:
    check_write((8, 2, 128), 3, kind, target, splits=2, norm=True)


@pytest.mark.parametrize("num_tokens", [1, 64, 1025])
@pytest.mark.parametrize("heads", LARGE_HEADS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_large_write(kind: str, heads: tuple[int, int, int], num_tokens: int, gpu_target: Target) -> None:
    check_write(heads, num_tokens, kind, gpu_target, block_size=64)
    check_write(heads, num_tokens, kind, gpu_target, block_size=64, splits=3)


def test_write_of_partial_sums(target: Target) -> None:
    check_write((4, 2, 64), 3, "token", target, splits=2)


def test_zeros_and_large_values_are_written(target: Target) -> None:
    """A head of zeros has a scale, the largest fp16 numbers keep theirs."""
    heads = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 64}
    qkv = torch.zeros(2, 3 * 64).to(target.device, target.dtype)
    qkv[1, 64:] = 60000.0 if target.dtype != torch.bfloat16 else 59904.0
    k, v = (torch.zeros(1, 1, 16, 64, dtype=torch.uint8, device=target.device) for _ in range(2))
    scales = TokenScales(*(torch.zeros(1, 1, 16, device=target.device) for _ in range(2)))
    cos_sin = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), dim=1).to(target.device)
    indices = torch.tensor([0, 0], device=target.device), torch.tensor([3, 4], dtype=torch.int32, device=target.device)
    rotary_kv_write(qkv, cos_sin, *indices, k, v, **heads, scales=scales)
    assert (k[0, 0, 3] == 128).all() and (v[0, 0, 3] == 128).all() and scales.k[0, 0, 3] > 0
    assert (v[0, 0, 4] == 255).all()
    assert_close(scales.v[0, 0, 4:5] * 127, qkv[1, 64:65].float().cpu())


def flat_pages(
    pages: Pages, query_lens: list[int], context_lens: list[int], capacity: int, target: Target, *,
    num_decodes: int = 0, num_padding: int = 0, written: bool = False,
) -> tuple[FlatPages | None, torch.Tensor]:  # fmt: skip
    """A scratch of NaN, and cu_seqlens_q of the prompts, which follow the decodes."""
    starts = torch.tensor([num_decodes, *query_lens]).cumsum(0).to(torch.int32).to(target.device)
    if not target.triton:
        return None, starts
    scratch = [
        torch.full((capacity, *pages.k_cache.shape[1:]), float("nan")).to(target.device, target.dtype) for _ in range(2)
    ]
    flat = plan_flat_pages(
        *scratch, pages.block_tables, starts, pages.context_lens, written=written,
        lens=None if num_padding else list(zip(query_lens, context_lens, strict=True)),
        num_tokens=num_decodes + sum(query_lens) + num_padding,
    )  # fmt: skip
    return flat, starts


def check_prefill(
    heads: tuple[int, int, int], query_lens: list[int], context_lens: list[int], kind: str, target: Target, *,
    block_size: int, capacity: int, written: bool = False, num_padding: int = 0,
) -> None:  # fmt: skip
    """Attention of prompts that are in the pages, or are written there before, to the scratch too.

    written: as in a step, behind two decodes. num_padding: tokens of nobody that follow; then the host does not know
    the lengths, as when a graph is captured.
    """
    num_heads, num_kv_heads, head_dim = heads
    pages, scales = int8_pages(
        make_pages(context_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, target=target),
        kind,
    )
    num_decodes, num_tokens = 2 if written else 0, sum(query_lens)
    flat, starts = flat_pages(
        pages, query_lens, context_lens, capacity, target, num_decodes=num_decodes, num_padding=num_padding,
        written=written,
    )  # fmt: skip
    if written:
        slots = [-1] * num_decodes + slots_of(pages, query_lens, context_lens) + [-1] * num_padding
        positions = [i for count, ctx in zip(query_lens, context_lens, strict=True) for i in range(ctx - count, ctx)]
        q = written_step(heads, [0] * num_decodes + positions + [0] * num_padding, slots, pages, scales, flat, target)
    else:
        q = 2 * target.randn(num_tokens, num_heads, head_dim)
    out = torch.full_like(q, float("nan"))
    k_cache, v_cache, block_tables, lengths = pages
    result = paged_prefill_attention(
        q, k_cache, v_cache, block_tables, starts, lengths, max_query_len=max(query_lens), softmax_scale=0.125,
        scales=scales, flat=flat, out=out,
    )  # fmt: skip
    assert result is out
    expected = reference.paged_prefill_attention(
        q.cpu().float(), k_cache.cpu(), v_cache.cpu(), block_tables.cpu(), starts.cpu(), lengths.cpu(),
        softmax_scale=0.125, scales=on_cpu(scales),
    )  # fmt: skip
    prompts = slice(num_decodes, num_decodes + num_tokens)
    assert_vectors_close(out[prompts], expected[prompts], target.dtype)


def slots_of(pages: Pages, query_lens: list[int], context_lens: list[int]) -> list[int]:
    """Of the last query_lens tokens of each sequence."""
    block_size, tables = pages.k_cache.shape[2], pages.block_tables.cpu()
    return [
        int(tables[row, i // block_size]) * block_size + i % block_size
        for row, (count, ctx) in enumerate(zip(query_lens, context_lens, strict=True))
        for i in range(ctx - count, ctx)
    ]


def written_step(
    heads: tuple[int, int, int], positions: list[int], slots: list[int], pages: Pages, scales: KVScales,
    flat: FlatPages | None, target: Target,
) -> torch.Tensor:  # fmt: skip
    """Writes random keys and values to these slots. Returns the rotated queries."""
    num_heads, num_kv_heads, head_dim = heads
    angles = torch.rand(max(positions) + 1, head_dim // 2) * 6
    return rotary_kv_write(
        target.randn(len(slots), (num_heads + 2 * num_kv_heads) * head_dim),
        torch.cat((angles.cos(), angles.sin()), dim=1).to(target.device),
        torch.tensor(positions, device=target.device), torch.tensor(slots, dtype=torch.int32, device=target.device),
        pages.k_cache, pages.v_cache, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, scales=scales,
        flat=flat,
    )  # fmt: skip


@pytest.mark.parametrize("capacity", [9, 4], ids=["one group", "groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill(kind: str, capacity: int, target: Target) -> None:
    """Whole prompts and chunks, an empty one among them; all at once, and in groups of one or two."""
    check_prefill((4, 2, 64), [5, 20, 0, 13], [5, 60, 3, 45], kind, target, block_size=16, capacity=capacity)


@pytest.mark.parametrize(("capacity", "num_padding"), [(9, 0), (4, 0), (9, 7)], ids=["one group", "groups", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_written_prefill(kind: str, capacity: int, num_padding: int, target: Target) -> None:
    """A whole prompt, one after whole pages, one after part of a page, an empty one."""
    if not target.triton:
        pytest.skip("the CPU path has no scratch")
    check_prefill(
        (4, 2, 64), [20, 13, 0, 9], [20, 45, 3, 40], kind, target, block_size=16, capacity=capacity, written=True,
        num_padding=num_padding,
    )  # fmt: skip


def test_prefill_of_odd_heads(target: Target) -> None:
    check_prefill((4, 1, 80), [5, 13], [5, 45], "token", target, block_size=16, capacity=4)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("heads", LARGE_HEADS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_large_prefill(kind: str, heads: tuple[int, int, int], block_size: int, gpu_target: Target) -> None:
    """Short runs, and long ones, which have a kernel of their own on Hopper."""
    query_lens, context_lens = [257, 1, 64, 0, 500], [257, 300, 64, 10, 1777]
    for capacity in (60, 28):
        check_prefill(heads, query_lens, context_lens, kind, gpu_target, block_size=block_size, capacity=capacity)
    check_prefill(heads, [1700, 16], [2750, 77], kind, gpu_target, block_size=block_size, capacity=43)
    lens = [100, 1700, 16], [100, 2750, 77]
    for num_padding in (0, 99):
        check_prefill(
            heads, *lens, kind, gpu_target, block_size=block_size, capacity=50, written=True, num_padding=num_padding
        )


def test_a_sequence_larger_than_the_scratch_is_refused(target: Target) -> None:
    if not target.triton:
        pytest.skip("the CPU path has no scratch")
    pages, _ = int8_pages(make_pages([9, 40], num_kv_heads=1, head_dim=64, block_size=16, target=target), "layer")
    with pytest.raises(ValueError, match="sequence 1 has 3 pages, expected at most 2"):
        flat_pages(pages, [9, 40], [9, 40], 2, target)


def test_arguments_are_checked() -> None:
    target = Target(False, "cpu", torch.float32)
    floats = make_pages([5, 9], num_kv_heads=2, head_dim=64, block_size=16, target=target)
    pages, scales = int8_pages(floats, "token")
    assert isinstance(scales, TokenScales)
    q = target.randn(2, 4, 64)
    with pytest.raises(ValueError, match=r"k_cache has dtype torch\.float32, expected torch\.uint8"):
        paged_decode_attention(q, *floats, softmax_scale=1.0, scales=scales)
    with pytest.raises(ValueError, match=r"k_cache has dtype torch\.uint8"):
        paged_decode_attention(q, *pages, softmax_scale=1.0)
    with pytest.raises(ValueError, match=r"scales\.v has shape"):
        paged_decode_attention(q, *pages, softmax_scale=1.0, scales=scales._replace(v=scales.v[:1]))
    with pytest.raises(ValueError, match=r"dtype is torch\.uint8"):
        rotary_kv_write(
            torch.zeros(2, 2, 8 * 64), torch.zeros(4, 64), torch.zeros(2).long(), torch.zeros(2).int(), *pages[:2],
            num_heads=4, num_kv_heads=2, head_dim=64, scales=scales,
        )  # fmt: skip
