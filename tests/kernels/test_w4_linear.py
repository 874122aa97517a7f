"""Products with 4-bit weights against the dequantised weight, and the kernels' layout of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.kernel_cases import CPU_TARGETS, Target
from tests.kernels.w4_cases import Weight, emulated_ptx, random_awq, random_weight
from tests.tolerances import assert_close
from tritonmind.kernels import add_rms_norm, gluon_w4_linear, reference, rms_norm, w4_gate_up, w4_linear
from tritonmind.kernels.awq_format import dequantize
from tritonmind.kernels.dispatch import force_triton
from tritonmind.kernels.linear import MIN_ADDED_ROWS
from tritonmind.kernels.tile_table import LIBRARY, Tile
from tritonmind.kernels.w4_layout import pack, packed_bytes, unpack

__all__ = ["emulated_ptx"]

# (rows, N, K, group size) and a tile: odd rows, blocks that N and K do not fill, splits that share blocks unevenly or
# have none, scales on sums and, in the tile of 128 rows, on weights.
CASES = [
    ((1, 40, 320, 64), Tile(8, 32, splits=2)),
    ((1, 40, 320, 64), Tile(8, 32, splits=2, slices=8)),
    ((3, 64, 256, 128), Tile(8, 32, slices=2)),
    ((3, 96, 128, 128), Tile(8, 64, splits=1)),
    ((17, 64, 96, 32), Tile(16, 32, splits=3)),
    ((5, 72, 192, 64), Tile(128, 64, splits=2)),
]
ROWS = (1, 7, 8, 33, 64, 130)
SIZES = ((4096, 11008), (960, 576), (1000, 1536))
TILES = (
    Tile(8, 32, splits=4, prefetch=1, num_warps=1, num_stages=4),
    Tile(8, 64, splits=4, prefetch=4, num_warps=2, num_stages=4),
    Tile(16, 128, splits=3, prefetch=2, num_warps=4, num_stages=4),
    Tile(32, 64, splits=2, prefetch=2, num_warps=4, num_stages=3),
    Tile(64, 128, splits=2, prefetch=2, num_warps=8, num_stages=3),
    Tile(128, 128, splits=2, prefetch=2, num_warps=8, num_stages=3),
    LIBRARY,
)
# As CASES, for warp groups on Hopper: each way to store, all group sizes, more tiles than the card has multiprocessors,
# fewer blocks of K than slots.
GROUP_CASES = [
    ((333, 1000, 1536, 128), Tile(128, 64, warp_groups=2, splits=3, num_stages=4)),
    ((4100, 1544, 576, 64), Tile(128, 64, warp_groups=3, num_stages=4)),
    ((700, 4096, 992, 32), Tile(128, 128, warp_groups=2, num_stages=4)),
    ((257, 2056, 256, 128), Tile(256, 64, warp_groups=2, num_stages=2)),
    ((1, 104, 320, 64), Tile(64, 64, warp_groups=3, splits=2, num_stages=4)),
    ((130, 128, 64, 32), Tile(128, 64, warp_groups=2, splits=2, num_stages=4)),
    ((700, 4096, 256, 64), Tile(128, 64, warp_groups=2, num_stages=4)),
    ((5, 1000, 1536, 128), Tile(16, 64, warp_groups=3, splits=8, num_stages=4)),
    ((40, 4096, 992, 32), Tile(32, 128, warp_groups=2, num_stages=4)),
    ((64, 2056, 1024, 64), Tile(64, 128, warp_groups=2, splits=4, num_stages=4)),
    ((11, 4096, 1536, 128), Tile(16, 128, warp_groups=2, splits=2, num_stages=4)),
    ((24, 2056, 1024, 64), Tile(32, 64, warp_groups=3, num_stages=4)),
]


def only_16_bits(target: Target) -> None:
    if target.dtype == torch.float32:
        pytest.skip("4-bit weights are multiplied in 16 bits")


def poisoned(rows: int, columns: int, target: Target) -> torch.Tensor:
    return torch.full((rows, columns), float("nan"), dtype=target.dtype, device=target.device)


def check_linear(rows: int, weight: Weight, tile: Tile, target: Target) -> None:
    packed = weight.packed
    x, bias = target.randn(rows, packed.k), target.randn(packed.n)
    expected = reference.linear(x.float(), weight.dense)
    parts = w4_linear(x, packed, tile=tile, partial_sums=True)
    if parts.dim() == 3:
        # What the weight written out in 16 bits is handed to has a tile of its own.
        assert parts.dtype == torch.float32 and len(parts) > 1 and (tile.is_whole or len(parts) == tile.splits)
        # Where scales are applied to sums nothing was rounded: only the order of the sum is another. Warp groups apply
        # them to the weight.
        exact = not (tile.is_whole or tile.warp_groups) and 2 * tile.block_m <= packed.group_size
        assert_close(parts.sum(0), expected, torch.float32 if exact else target.dtype)
    out = poisoned(rows, packed.n, target)
    assert w4_linear(x, packed, bias, tile=tile, out=out) is out
    assert_close(out, expected + bias.float(), target.dtype)


def check_gate_up(rows: int, weight: Weight, tile: Tile | None, target: Target) -> None:
    packed = weight.packed
    x, out = target.randn(rows, packed.k), poisoned(rows, packed.n // 2, target)
    assert w4_gate_up(x, packed, tile=None if tile is None else tile._replace(splits=1), out=out) is out
    expected = reference.gate_up(x.float(), weight.dense)
    # A product of two has elements of many times the mean, whose own rounding would count: those by their own size.
    size = 1 + expected.abs() / expected.square().mean().sqrt()
    assert_close(out / size, expected / size, target.dtype)


@pytest.mark.parametrize(("size", "tile"), CASES, ids=str)
def test_w4_linear(size: tuple[int, int, int, int], tile: Tile, target: Target) -> None:
    only_16_bits(target)
    weight = random_weight(*size[1:], target)
    check_linear(size[0], weight, tile, target)
    check_linear(size[0], weight, LIBRARY, target)


@pytest.mark.parametrize(("size", "tile"), CASES, ids=str)
def test_w4_gate_up(size: tuple[int, int, int, int], tile: Tile, target: Target) -> None:
    only_16_bits(target)
    weight = random_weight(*size[1:], target, gated=True)
    check_gate_up(size[0], weight, tile, target)
    check_gate_up(size[0], weight, LIBRARY, target)


@pytest.mark.usefixtures("emulated_ptx")
@pytest.mark.parametrize(("size", "tile"), [CASES[1], CASES[3]], ids=str)
def test_ptx(size: tuple[int, int, int, int], tile: Tile) -> None:
    """The interpreter runs the instructions that a card would."""
    target = CPU_TARGETS["interpreter-fp16"]
    with force_triton():
        check_linear(size[0], random_weight(*size[1:], target), tile, target)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_large(tile: Tile, n: int, k: int, group_size: int, gpu_target: Target) -> None:
    """Every tile meets fewer and more rows than it has."""
    only_16_bits(gpu_target)
    if k % group_size:
        pytest.skip("group size does not divide K")
    weight, gated = (random_weight(n, k, group_size, gpu_target, gated=gated) for gated in (False, True))
    for rows in ROWS:
        check_linear(rows, weight, tile, gpu_target)
        check_gate_up(rows, gated, tile._replace(block_n=max(tile.block_n // 2, 16)), gpu_target)


@pytest.mark.parametrize(("size", "tile"), GROUP_CASES, ids=str)
def test_warp_groups(size: tuple[int, int, int, int], tile: Tile, gpu_target: Target) -> None:
    """Rows and features beyond whole tiles, a last part of K, what stands in memory added to."""
    only_16_bits(gpu_target)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    rows, n, k, _ = size
    weight, gated = (random_weight(*size[1:], gpu_target, gated=gated) for gated in (False, True))
    check_linear(rows, weight, tile, gpu_target)
    check_gate_up(rows, gated, tile, gpu_target)
    x, add_to = gpu_target.randn(rows, k), gpu_target.randn(rows, n)
    one, other = (w4_linear(x, weight.packed, tile=tile, partial_sums=True) for _ in range(2))
    assert torch.equal(one, other)
    expected = reference.linear(x.float(), weight.dense)
    is_added = rows >= MIN_ADDED_ROWS
    expected += add_to.float() * is_added
    y = w4_linear(x, weight.packed, tile=tile, add_to=add_to)
    assert (y is add_to) == is_added
    assert_close(y, expected, gpu_target.dtype)


@pytest.mark.parametrize(("k", "splits"), [(96, 1), (160, 2), (640, 3)])
def test_every_split_has_something_to_multiply(k: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp group waits for the first block of its split: without one, for ever."""
    monkeypatch.setattr(gluon_w4_linear, "multiply", lambda x, weight, bias, out, tile: out)
    target = CPU_TARGETS["interpreter-fp16"]
    x, weight = target.randn(130, k), random_weight(128, k, 32, target)
    with force_triton():
        out = w4_linear(x, weight.packed, tile=GROUP_CASES[0][1], partial_sums=True)
    assert out.shape == ((splits, 130, 128) if splits > 1 else (130, 128))


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_that_the_kernel_before_has_just_written(splits: int, gpu_target: Target) -> None:
    """The weight comes before that kernel has ended, its result after: in a graph of many, over and over."""
    only_16_bits(gpu_target)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    tile = Tile(32, 64, warp_groups=2, splits=splits, num_stages=4)
    weight = random_weight(1024, 1024, 128, gpu_target).packed
    start, norm = gpu_target.randn(32, 1024), gpu_target.randn(1024)

    def chain(*, wait: bool) -> torch.Tensor:
        residual = start.clone()
        x = rms_norm(residual, norm, eps=1e-5)
        for _ in range(8):
            y = w4_linear(x, weight, tile=tile, partial_sums=True)
            if wait:
                torch.cuda.synchronize()
            x, _ = add_rms_norm(y, residual, norm, eps=1e-5)
            if wait:
                torch.cuda.synchronize()
        return x

    expected, graph = chain(wait=True), torch.cuda.CUDAGraph()
    assert not expected.isnan().any()
    with torch.cuda.graph(graph):
        found = chain(wait=False)
    for _ in range(50):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 16, 24, 48, 64, 256, 300, 600])
def test_what_dispatch_chooses(rows: int, gpu_target: Target) -> None:
    """The card's own tiles, and the rules' where it has none; with a scratch, larger than it must be."""
    only_16_bits(gpu_target)
    for n, k, group_size in ((4096, 4096, 128), (12288, 4096, 128), (4096, 11008, 128), (960, 576, 64), (104, 96, 32)):
        x, weight = gpu_target.randn(rows, k), random_weight(n, k, group_size, gpu_target)
        scratch = torch.full((2 * n * k + 5,), float("nan"), dtype=gpu_target.dtype, device="cuda")
        y = w4_linear(x, weight.packed, partial_sums=True, scratch=scratch)
        expected = reference.linear(x.float(), weight.dense)
        assert_close(y.float().sum(0) if y.dim() == 3 else y, expected, gpu_target.dtype)
        weight = random_weight(n, k, group_size, gpu_target, gated=True)
        check_gate_up(rows, weight, None, gpu_target)


def test_row_does_not_depend_on_the_batch(target: Target) -> None:
    """Nor on the block of rows that it falls into; splits add up in one order."""
    if not target.triton or target.dtype == torch.float32:
        pytest.skip("the library's order of summation is its own")
    tile = Tile(16, 32, splits=2)
    x, weight = target.randn(20, 256), random_weight(64, 256, 64, target).packed
    batch = w4_linear(x, weight, tile=tile, partial_sums=True)
    for row in (0, 19):
        assert torch.equal(w4_linear(x[row : row + 1], weight, tile=tile, partial_sums=True)[:, 0], batch[:, row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "group_size"), [(32, 128, 128), (40, 320, 64), (104, 96, 32)])
def test_layout_holds_the_weight(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    """Every value comes back, and blocks that are not full take no more than they must."""
    parts = [random_awq(n, k, group_size) for _ in range(2)]
    assert torch.equal(unpack(pack(parts[:1], dtype), torch.float32), dequantize(parts[0]))
    gated = pack(parts, dtype)
    assert torch.equal(unpack(gated, torch.float32), torch.cat([dequantize(part) for part in parts]))
    assert gated.num_bytes == packed_bytes(2 * n, k, group_size)
    assert packed_bytes(4096, 11008, 128) / (4096 * 11008) == 0.53125


def test_word_is_what_the_kernels_read() -> None:
    """One level and one zero point, where w4_layout.py says that they are."""
    awq = random_awq(64, 256, 64)
    levels = dequantize(awq._replace(qzeros=torch.zeros_like(awq.qzeros), scales=torch.ones_like(awq.scales)))
    packed = pack([awq], torch.float16)
    word = int(packed.words[1, 1, 5, 3])  # row 37, k = 128 + ...
    for place, half in itertools.product(range(4), range(2)):
        assert word >> (4 * place + 16 * half) & 15 == levels[37, 128 + 32 * place + 2 * 3 + half]
    params = packed.params[1, 1, 1, 5]  # the fourth group of 64
    zero = -dequantize(awq._replace(qweight=torch.zeros_like(awq.qweight), scales=torch.ones_like(awq.scales)))[37, 192]
    assert params.to(torch.int16).view(torch.float16) == awq.scales[3, 37]
    assert (params >> 16).to(torch.int16).view(torch.float16) == -(1024 + zero)


def test_arguments_are_checked() -> None:
    target = CPU_TARGETS["cpu-fp16"]
    plain, gated = (random_weight(64, 128, 128, target, gated=gated).packed for gated in (False, True))
    x = target.randn(4, 128)
    with pytest.raises(ValueError, match=r"x has shape \(4, 64\), expected \(4, 128\)"):
        w4_linear(x[:, :64].contiguous(), plain)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float32, expected torch\.float16"):
        w4_linear(x.float(), plain)
    with pytest.raises(ValueError, match="bias has shape"):
        w4_linear(x, plain, target.randn(65))
    with pytest.raises(ValueError, match="exclude each other"):
        w4_linear(x, plain, partial_sums=True, out=target.randn(4, 64))
    with pytest.raises(ValueError, match=r"scratch has shape \(8191,\), expected \(8192,\)"):
        w4_linear(x, plain, scratch=target.randn(8191))
    with pytest.raises(ValueError, match="packed as gate and up"):
        w4_linear(x, gated)
    with pytest.raises(ValueError, match="not as gate and up"):
        w4_gate_up(x, plain)
    with pytest.raises(ValueError, match="out has shape"):
        w4_gate_up(x, gated, out=target.randn(4, 128))
    with pytest.raises(ValueError, match=r"dtype=torch\.float32 has no kernels for 4-bit weights"):
        pack([random_awq(64, 128, 128)], torch.float32)
