"""The formulas of the int8 KV cache."""

import torch

from tritonmind.kernels import kv_quant


def test_asymmetric_range_is_within_half_a_step() -> None:
    x = torch.randn(4000) * 3 + 5
    scale, zero = kv_quant.asymmetric_scale(x.min(), x.max())
    assert scale.dtype == zero.dtype == torch.float32
    torch.testing.assert_close(scale, (x.max() - x.min()) / 255)
    torch.testing.assert_close(zero, (x.max() + x.min()) / 2)
    stored = kv_quant.quantise(x, scale, zero)
    # The smallest value lies half-way between two steps.
    assert stored.dtype == torch.uint8 and stored.min() <= 1 and stored.max() == 255
    error = (kv_quant.dequantise(stored, scale, zero) - x).abs().max()
    assert error <= 0.501 * scale, "an error of more than half a step"


def test_values_beyond_the_calibrated_range_get_its_ends() -> None:
    x = torch.tensor([-100.0, -1.0, 3.0, 100.0])
    scale, zero = kv_quant.asymmetric_scale(x[1], x[2])
    back = kv_quant.dequantise(kv_quant.quantise(x, scale, zero), scale, zero)
    torch.testing.assert_close(back, torch.tensor([-1.0, -1.0, 3.0, 3.0]), atol=0.51 * float(scale), rtol=0)


def test_symmetric_scale_keeps_zero_and_the_largest() -> None:
    x = torch.tensor([-2.54, 0.0, 1.27])
    scale = kv_quant.symmetric_scale(x.abs().max())
    assert kv_quant.quantise(x, scale).tolist() == [1, 128, 192]  # 63.5 goes to the even 64
    torch.testing.assert_close(scale, torch.tensor(0.02))


def test_each_row_has_its_scale() -> None:
    x = torch.randn(5, 3, 64) * torch.tensor([1e-6, 1e-2, 1.0, 50.0, 10000.0])[:, None, None]
    stored, scales = kv_quant.quantise_tokens(x.half().float())
    assert scales.shape == (5, 3)
    error = (kv_quant.dequantise(stored, scales.unsqueeze(-1)) - x.half().float()).abs().amax(-1)
    assert (error <= 0.501 * scales).all()


def test_values_all_alike_come_back() -> None:
    x = torch.full((2, 8), 0.75)
    scale, zero = kv_quant.asymmetric_scale(x.min(), x.max())
    assert scale > 0
    assert torch.equal(kv_quant.dequantise(kv_quant.quantise(x, scale, zero), scale, zero), x)
    stored, scales = kv_quant.quantise_tokens(torch.zeros(2, 8))
    assert (scales > 0).all() and (stored == 128).all()
