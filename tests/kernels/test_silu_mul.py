"""SwiGLU's elementwise half."""

import pytest
import torch

from tests.kernels.kernel_cases import Target
from tests.tolerances import assert_close
from tritonmind.kernels import reference, silu_mul

SHAPES = [(1, 32), (3, 100), (2, 1536), (4, 1), (0, 16)]
LARGE_SHAPES = [(1, 11008), (513, 14336), (64, 1031)]


def check(shape: tuple[int, int], target: Target) -> None:
    num_tokens, width = shape
    x = 4 * target.randn(num_tokens, 2 * width)
    expected = reference.silu_mul(x.cpu().float())
    assert_close(silu_mul(x), expected, target.dtype)
    out = torch.full((num_tokens, width), float("nan"), dtype=target.dtype, device=target.device)
    assert silu_mul(x, out) is out
    assert_close(out, expected, target.dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_silu_mul(shape: tuple[int, int], target: Target) -> None:
    check(shape, target)


@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_large(shape: tuple[int, int], gpu_target: Target) -> None:
    check(shape, gpu_target)


def test_extreme_gates(target: Target) -> None:
    """exp overflows for a very negative gate; the product is then 0, not NaN."""
    gates = torch.tensor([[-6e4, -200.0, -20.0, 0.0, 20.0, 200.0]])
    x = torch.cat((gates, torch.full_like(gates, 2.0)), dim=1).to(target.device, target.dtype)
    assert_close(silu_mul(x), reference.silu_mul(x.cpu().float()), target.dtype)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="x has 7 columns"):
        silu_mul(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"x with strides .* is not contiguous"):
        silu_mul(torch.randn(2, 16)[:, :8])
    with pytest.raises(ValueError, match="out has dtype"):
        silu_mul(torch.randn(2, 8), torch.empty(2, 4).half())
