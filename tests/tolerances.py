"""The one tolerance table: how far a result may be from its fp32 reference, by the dtype it was computed in."""

import torch

# Error relative to the root mean square of the reference.
RELATIVE_RMS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}
# One wrong element hides in a mean: no single error may exceed this many times the mean's bound.
WORST_ELEMENT = 16


def assert_vectors_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """assert_close of vectors, the last dimension, each relative to its own root mean square.

    For attention, whose means over many tokens are small beside those over few: a bound for all would be too wide for
    the former, and too narrow for the rounding of the latter.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    scale = expected.double().square().mean(dim=-1, keepdim=True).sqrt()
    is_zero = (scale == 0).expand_as(expected)
    assert not actual.to(scale.device)[is_zero].any(), "expected zeros"
    scale[scale == 0] = 1
    expected = expected.double() / scale
    assert_close(actual.double().to(scale.device) / scale, expected, dtype or actual.dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Fail unless `actual` is within the bounds of `dtype`, by default its own. NaN is never close to anything."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    bound = RELATIVE_RMS[dtype or actual.dtype]
    expected = expected.double()
    error = actual.double().to(expected.device) - expected
    if not error.numel():
        return
    scale = expected.square().mean().sqrt()
    if scale == 0:
        assert not error.any(), "expected zeros"
        return
    rms, worst = error.square().mean().sqrt() / scale, error.abs().max() / scale
    assert rms <= bound, f"relative RMS error {rms:.2e} exceeds {bound:.0e}"
    assert worst <= WORST_ELEMENT * bound, f"worst error {worst:.2e} exceeds {WORST_ELEMENT * bound:.0e} of the RMS"
