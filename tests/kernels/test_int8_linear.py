"""Products with an 8-bit weight against that weight in fp32, and how far it is from what it was."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_cases import CPU_TARGETS, Target
from tests.kernels.w4_cases import emulated_ptx
from tests.tolerances import assert_close
from tritonmind.kernels import int8_linear, product_variants, reference
from tritonmind.kernels.dispatch import force_triton
from tritonmind.kernels.int8_layout import dequantize_int8, quantize_int8
from tritonmind.kernels.tile_table import Tile
from tritonmind.layers.linear import Int8Linear

__all__ = ["emulated_ptx"]

CASES = [((1, 40, 96), Tile(8, 32, num_warps=1)), ((11, 96, 128), Tile(8, 64, num_warps=2))]
LARGE_CASES = [
    ((1, 32000, 4096), Tile(8, 128, prefetch=2, num_warps=4, num_stages=5)),
    ((7, 128256, 4096), Tile(8, 64, prefetch=4, num_warps=2, num_stages=4)),
    ((33, 49152, 576), Tile(32, 128, prefetch=8, num_warps=4, num_stages=4)),
    ((64, 1000, 1000), Tile(64, 128, prefetch=0, num_warps=8, num_stages=3)),
]


def check(size: tuple[int, int, int], tile: Tile, target: Target) -> None:
    rows, n, k = size
    x, weight = target.randn(rows, k), quantize_int8(target.randn(n, k) * torch.rand(n, 1, device=target.device))
    out = torch.full((rows, n), float("nan"), dtype=target.dtype, device=target.device)
    assert int8_linear(x, weight, tile=tile, out=out) is out
    assert_close(out, reference.linear(x.float(), dequantize_int8(weight)), target.dtype)


@pytest.mark.parametrize(("size", "tile"), CASES, ids=str)
def test_int8_linear(size: tuple[int, int, int], tile: Tile, target: Target) -> None:
    if target.dtype == torch.float32:
        pytest.skip("8-bit weights are multiplied in 16 bits")
    check(size, tile, target)


@pytest.mark.usefixtures("emulated_ptx")
def test_ptx() -> None:
    with force_triton():
        check(*CASES[0], CPU_TARGETS["interpreter-fp16"])


@pytest.mark.parametrize(("size", "tile"), LARGE_CASES, ids=str)
def test_large(size: tuple[int, int, int], tile: Tile, gpu_target: Target) -> None:
    if gpu_target.dtype == torch.float32:
        pytest.skip("8-bit weights are multiplied in 16 bits")
    check(size, tile, gpu_target)


@pytest.mark.parametrize("rows", [1, 20, 300])
def test_a_layer_takes_it_for_few_rows(rows: int, gpu_target: Target) -> None:
    if gpu_target.dtype == torch.float32:
        pytest.skip("8-bit weights are multiplied in 16 bits")
    layer = Int8Linear(1024, 32000, bias=False, dtype=gpu_target.dtype, device=torch.device("cuda"))
    assert layer.weight is not None
    layer.weight.normal_()
    layer.finalize()
    x = gpu_target.randn(rows, 1024)
    expected = reference.linear(x.float(), layer.weight.float())
    y = layer(x, out=torch.full((rows, 32000), float("nan"), dtype=gpu_target.dtype, device="cuda")).float()
    error = (y - expected).norm() / expected.norm()
    # Of a uniform error of half a level: 4 sigma of the weight over 127 levels and the root of 12.
    assert 0.005 < error < 0.02 if rows <= 32 else error < 0.005
    device = torch.device("cuda", torch.cuda.current_device())
    assert set(product_variants("int8_linear", 32000, 1024, rows, device)) <= set(layer.row_variants(rows))


@pytest.mark.parametrize(("n", "k"), [(32, 64), (5000, 100)])
def test_levels_are_the_nearest(n: int, k: int) -> None:
    """Of every row, whatever its size, and beyond the rows that are rounded at once; a row of zeros stays one."""
    weight = torch.randn(n, k) * torch.logspace(-3, 3, n)[:, None]
    weight[7] = 0
    found = quantize_int8(weight)
    assert found.scales.shape == (n,) and found.words.shape == (-(-n // 32), -(-k // 64), 32, 16)
    error = (dequantize_int8(found) - weight).abs()
    assert (error <= 0.5001 * found.scales[:, None]).all() and not error[7].any()


def test_arguments_are_checked() -> None:
    weight = quantize_int8(torch.randn(40, 96))
    with pytest.raises(ValueError, match=r"x has shape \(4, 95\), expected \(4, 96\)"):
        int8_linear(torch.randn(4, 95).half(), weight)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float32, expected torch\.float16 or torch\.bfloat16"):
        int8_linear(torch.randn(4, 96), weight)
    with pytest.raises(ValueError, match="out has shape"):
        int8_linear(torch.randn(4, 96).half(), weight, out=torch.empty(4, 41).half())
