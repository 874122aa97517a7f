"""RMSNorm with and without the residual add."""

import pytest
import torch

from tests.kernels.kernel_cases import Target
from tests.tolerances import assert_close
from tritonmind.kernels import add_rms_norm, reference, rms_norm

EPS = 1e-5
SHAPES = [(1, 64), (3, 100), (2, 576), (5, 1), (0, 64)]
LARGE_SHAPES = [(1, 4096), (257, 4096), (33, 5120), (7, 8192), (64, 12345)]


def check_rms_norm(shape: tuple[int, int], target: Target) -> None:
    x, weight = 3 * target.randn(*shape), target.randn(shape[1])
    expected = reference.rms_norm(x.cpu().float(), weight.cpu().float(), eps=EPS)
    assert_close(rms_norm(x, weight, eps=EPS), expected, target.dtype)
    out = torch.full_like(x, float("nan"))
    assert rms_norm(x, weight, eps=EPS, out=out) is out
    assert_close(out, expected, target.dtype)
    assert rms_norm(x, weight, eps=EPS, out=x) is x
    assert torch.equal(x, out)


def check_add_rms_norm(shape: tuple[int, int], target: Target) -> None:
    x, residual, weight = target.randn(*shape), 3 * target.randn(*shape), target.randn(shape[1])
    total = (x.cpu().float() + residual.cpu().float()).to(target.dtype)
    expected = reference.rms_norm(total.float(), weight.cpu().float(), eps=EPS)
    normed, updated = add_rms_norm(x, residual, weight, eps=EPS)
    assert updated is residual
    assert torch.equal(residual.cpu(), total)
    assert_close(normed, expected, target.dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], target: Target) -> None:
    check_rms_norm(shape, target)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], target: Target) -> None:
    check_add_rms_norm(shape, target)


@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_large(shape: tuple[int, int], gpu_target: Target) -> None:
    check_rms_norm(shape, gpu_target)
    check_add_rms_norm(shape, gpu_target)


def test_row_does_not_depend_on_the_batch(target: Target) -> None:
    x, weight = target.randn(9, 576), target.randn(576)
    batch = rms_norm(x, weight, eps=EPS)
    for row in (0, 4, 8):
        assert torch.equal(rms_norm(x[row : row + 1], weight, eps=EPS)[0], batch[row])


def test_rounds_before_the_weight(target: Target) -> None:
    """The order of Hugging Face's Llama, exactly: one rounding of the normalised row, one of the product."""
    if target.dtype == torch.float32:
        pytest.skip("fp32 has no rounding to order")
    x, weight = target.randn(4, 128), 1 + target.randn(128)
    x32 = x.float()
    normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(target.dtype)
    actual = rms_norm(x, weight, eps=EPS)
    # A different order of the sum moves a value across a rounding border now and then, never most of them.
    assert (actual == normed * weight).float().mean() > 0.95


def test_arguments_are_checked() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, torch.randn(4), eps=EPS)
    with pytest.raises(ValueError, match="weight has dtype"):
        rms_norm(x, weight.half(), eps=EPS)
    with pytest.raises(ValueError, match="x has dtype"):
        rms_norm(x.double(), weight.double(), eps=EPS)
    with pytest.raises(ValueError, match=r"x with strides .* is not contiguous"):
        rms_norm(torch.randn(8, 4).t(), weight, eps=EPS)
    with pytest.raises(ValueError, match="x has shape"):
        rms_norm(x.view(2, 2, 8), weight, eps=EPS)
    with pytest.raises(ValueError, match="out has shape"):
        rms_norm(x, weight, eps=EPS, out=torch.empty(3, 8))
    with pytest.raises(ValueError, match="residual has dtype"):
        add_rms_norm(x, torch.randn(4, 8).half(), weight, eps=EPS)
    with pytest.raises(ValueError, match="weight is on meta"):
        rms_norm(x, weight.to("meta"), eps=EPS)
