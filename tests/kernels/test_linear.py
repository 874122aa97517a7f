"""Products with a weight: by the library, and by kernels that share reductions."""

import pytest
import torch

from tests.kernels.kernel_cases import Target
from tests.tolerances import assert_close
from tritonmind.kernels import add_rms_norm, gate_up, linear, product_variants, reference, rotary_kv_write
from tritonmind.kernels.linear import MIN_ADDED_ROWS
from tritonmind.kernels.tile_table import LIBRARY, MANY_ROWS, Tile
from tritonmind.kernels.tuning import tile as tuned_tile

# (rows, N, K) and a tile: masks in every dimension, more row blocks than one, splits that share tiles unevenly.
CASES = [
    ((1, 64, 64), Tile(16, 32, 32, splits=1)),
    ((3, 80, 96), Tile(16, 32, 32, splits=2)),
    ((17, 96, 160), Tile(16, 64, 32, splits=4)),
    ((5, 64, 72), Tile(16, 32, 32, splits=3)),
]
# What an H100 is given for Llama-2-7B, with the odd sizes of others.
LARGE_CASES = [
    ((1, 4096, 4096), Tile(16, 64, 128, splits=4, prefetch=2, num_stages=4)),
    ((8, 12288, 4096), Tile(8, 64, 256, splits=2, prefetch=1, num_warps=2, num_stages=3)),
    ((33, 4096, 11008), Tile(64, 64, 128, splits=8, prefetch=2, num_stages=4)),
    ((65, 3584, 18944), Tile(64, 64, 128, splits=3, prefetch=4, num_stages=4)),
    ((256, 4096, 11008), Tile(128, 128, 64, splits=2, prefetch=2, num_warps=8, num_stages=4)),
    ((64, 32000, 4096), Tile(64, 128, 128, prefetch=2, num_stages=3)),
    ((7, 49152, 576), Tile(16, 64, 128, prefetch=2, num_stages=4)),
]


def make(size: tuple[int, int, int], target: Target, *, gated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """x, weight"""
    num_rows, n, k = size
    return target.randn(num_rows, k), target.randn(2 * n if gated else n, k) / k**0.5


def check_linear(size: tuple[int, int, int], tile: Tile, target: Target) -> None:
    x, weight = make(size, target)
    bias = target.randn(len(weight))
    for maybe in (None, bias):
        plain = [tensor if tensor is None else tensor.cpu().float() for tensor in (x, weight, maybe)]
        expected = reference.linear(*plain)
        out = torch.full((len(x), len(weight)), float("nan"), dtype=target.dtype, device=target.device)
        assert linear(x, weight, maybe, tile=tile, out=out) is out
        assert_close(out, expected, target.dtype)
        parts = linear(x, weight, maybe, tile=tile, partial_sums=True)
        if tile.splits > 1:
            assert parts.dtype == torch.float32 and len(parts) == tile.splits
            # Nothing was rounded: only the order of the sum is another.
            assert_close(parts.sum(0), expected, torch.float32 if target.device == "cpu" else torch.float16)
        else:
            assert torch.equal(parts, out)


@pytest.mark.parametrize(("size", "tile"), CASES, ids=str)
def test_linear(size: tuple[int, int, int], tile: Tile, target: Target) -> None:
    check_linear(size, tile if target.triton else LIBRARY, target)


@pytest.mark.parametrize(("size", "tile"), [(size, tile._replace(splits=1)) for size, tile in CASES], ids=str)
def test_gate_up(size: tuple[int, int, int], tile: Tile, target: Target) -> None:
    x, weight = make(size, target, gated=True)
    expected = reference.gate_up(x.cpu().float(), weight.cpu().float())
    for chosen in (tile, LIBRARY) if target.triton else (LIBRARY,):
        out = torch.full(expected.shape, float("nan"), dtype=target.dtype, device=target.device)
        assert gate_up(x, weight, tile=chosen, out=out) is out
        assert_close(out, expected, target.dtype)


@pytest.mark.parametrize(("size", "tile"), LARGE_CASES, ids=str)
def test_large(size: tuple[int, int, int], tile: Tile, gpu_target: Target) -> None:
    if gpu_target.dtype == torch.float32:
        pytest.skip("fp32 products are the library's")
    check_linear(size, tile, gpu_target)
    if size[1] < 16384 and tile.block_n < 128:
        x, weight = make(size, gpu_target, gated=True)
        expected = reference.gate_up(x.float(), weight.float())
        tile = tile._replace(splits=1, block_n=min(tile.block_n, 64), block_k=min(tile.block_k, 128), num_stages=3)
        assert_close(gate_up(x, weight, tile=tile), expected, gpu_target.dtype)


@pytest.mark.parametrize("size", [(300, 640, 1000), (257, 256, 64), (5000, 1032, 512), (129, 11008, 4096)], ids=str)
def test_many_rows(size: tuple[int, int, int], gpu_target: Target) -> None:
    """Rows and features beyond whole tiles, a last part of K, more tiles than the card has multiprocessors."""
    if gpu_target.dtype == torch.float32 or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for 2-byte types on Hopper")
    x, weight = make(size, gpu_target)
    out = torch.full((size[0], size[1]), float("nan"), dtype=gpu_target.dtype, device=gpu_target.device)
    weight = torch.cat((weight, weight.flip(0)))
    gated = gate_up(x, weight, tile=MANY_ROWS, out=out)
    assert_close(gated, reference.gate_up(x.float(), weight.float()), gpu_target.dtype)


@pytest.mark.parametrize("rows", [1, 16, 64, 256, 300, 1025])
def test_what_dispatch_chooses(rows: int, gpu_target: Target) -> None:
    """The card's own tiles, and the library where it has none."""
    for n, k in ((4096, 4096), (12288, 4096), (4096, 11008), (100, 72), (64, 44)):
        x, weight = make((rows, n, k), gpu_target)
        y = linear(x, weight, partial_sums=True)
        assert_close(
            y.float().sum(0) if y.dim() == 3 else y, reference.linear(x.float(), weight.float()), gpu_target.dtype
        )
        weight = torch.cat((weight, weight.flip(0)))
        assert_close(gate_up(x, weight), reference.gate_up(x.float(), weight.float()), gpu_target.dtype)
    device = torch.device("cuda", torch.cuda.current_device())
    assert product_variants("linear", 4096, 4096, rows, device)[0] == rows


def test_row_does_not_depend_on_the_batch(target: Target) -> None:
    """Nor on the block of rows that it falls into; splits add up in one order."""
    if not target.triton or target.dtype == torch.float32:
        pytest.skip("the library's order of summation is its own")
    tile = Tile(16, 32, 32, splits=3)
    x, weight = make((20, 64, 96), target)
    batch = linear(x, weight, tile=tile, partial_sums=True)
    for row in (0, 7, 19):
        assert torch.equal(linear(x[row : row + 1], weight, tile=tile, partial_sums=True)[:, 0], batch[:, row])


def test_consumers_add_partial_sums(target: Target) -> None:
    """The kernels that follow a product take its partial sums as they take its rounded values."""
    parts, residual, weight = target.randn(3, 5, 64).float(), target.randn(5, 64), target.randn(64)
    plain = residual.cpu().clone()
    expected, summed = reference.add_rms_norm(parts.cpu(), plain, weight.cpu(), eps=1e-5)
    normed, updated = add_rms_norm(parts, residual, weight, eps=1e-5)
    assert updated is residual and normed.dtype == target.dtype
    assert_close(updated, summed.float(), target.dtype)
    assert_close(normed, expected.float(), target.dtype)

    parts = target.randn(2, 3, 8 * 16).float()
    cos_sin, positions = torch.rand(8, 16, device=target.device), torch.tensor([0, 5, 2], device=target.device)
    slots = torch.tensor([3, -1, 17], dtype=torch.int32, device=target.device)
    caches = [torch.full((2, 2, 16, 16), float("nan"), dtype=target.dtype, device=target.device) for _ in range(2)]
    twins = [cache.cpu().float() for cache in caches]
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    q = rotary_kv_write(parts, cos_sin, positions, slots, *caches, **sizes)
    expected = reference.rotary_kv_write(parts.cpu(), cos_sin.cpu(), positions.cpu(), slots.cpu(), *twins, **sizes)
    assert q.dtype == target.dtype
    assert_close(q, expected, target.dtype)
    for cache, twin in zip(caches, twins, strict=True):
        written = ~twin.isnan()
        assert torch.equal(~cache.isnan().cpu(), written)
        assert_close(cache.cpu()[written], twin[written], target.dtype)


@pytest.mark.parametrize("rows", [1, MIN_ADDED_ROWS])
def test_many_rows_are_added_to_what_they_are_for(rows: int, target: Target) -> None:
    x, weight = make((rows, 24, 40), target)
    before = target.randn(rows, 24)
    add_to = before.clone()
    y = linear(x, weight, tile=LIBRARY, partial_sums=True, add_to=add_to)
    product = reference.linear(x.cpu().float(), weight.cpu().float())
    assert (y is add_to) == (rows == MIN_ADDED_ROWS)
    assert_close(y, product + before.cpu().float() if y is add_to else product, target.dtype)
    assert y is add_to or torch.equal(add_to, before)


def test_library_is_chosen_where_tiles_do_not_fit() -> None:
    cpu = torch.device("cpu")
    assert tuned_tile("linear", cpu, rows=1, n=100, k=64).library
    assert tuned_tile("linear", cpu, rows=100000, n=4096, k=4096).library


def test_arguments_are_checked() -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    with pytest.raises(ValueError, match="weight has shape"):
        linear(x, weight.t().contiguous())
    with pytest.raises(ValueError, match="weight has dtype"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match="bias has shape"):
        linear(x, weight, torch.randn(8))
    with pytest.raises(ValueError, match="out has dtype"):
        linear(x, weight, out=torch.empty(4, 6).half())
    with pytest.raises(ValueError, match="exclude each other"):
        linear(x, weight, partial_sums=True, out=torch.empty(4, 6))
    with pytest.raises(ValueError, match="out and add_to exclude each other"):
        linear(x, weight, add_to=torch.empty(4, 6), out=torch.empty(4, 6))
    with pytest.raises(ValueError, match="add_to has shape"):
        linear(x, weight, add_to=torch.empty(4, 8))
    with pytest.raises(ValueError, match="weight has 5 rows, expected an even number"):
        gate_up(x, weight[:5])
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 64\), expected \(2, 5, 64\)"):
        add_rms_norm(torch.randn(2, 4, 64), torch.randn(5, 64), torch.randn(64), eps=1e-5)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float16, expected torch\.float32"):
        add_rms_norm(torch.randn(2, 5, 64).half(), torch.randn(5, 64), torch.randn(64), eps=1e-5)
