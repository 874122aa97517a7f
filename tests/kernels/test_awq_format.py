"""The 4-bit form: words as other tools read them, and how far a quantised weight may be from what it came from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonmind import config
from tritonmind.kernels.awq_format import (
    GROUP_SIZES,
    NIBBLES_PER_WORD,
    AwqWeight,
    dequantize,
    group_params,
    pack_nibbles,
    quantize,
    quantize_groups,
    unpack_nibbles,
)

# Half a level, and what 15 levels lose when their scale is rounded to fp16.
MAX_ERROR_LEVELS = 0.5 + 15 * 2.0**-11


def test_the_configuration_knows_the_same_sizes() -> None:
    assert (config.GROUP_SIZES, config.INT4_PER_WORD) == (GROUP_SIZES, NIBBLES_PER_WORD)


def test_columns_in_a_word() -> None:
    columns = torch.arange(16).view(1, 16)
    assert pack_nibbles(columns % 8).tolist() == [[0x75316420, 0x75316420]]
    assert pack_nibbles(columns).tolist()[0][1] == 0xFDB9ECA8 - 2**32


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), words=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_words_hold_what_was_packed(rows: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (rows, 8 * words), generator=generator)
    packed = pack_nibbles(values)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words)
    assert unpack_nibbles(packed).equal(values.to(torch.uint8))


@settings(max_examples=30, deadline=None)
@given(
    out_features=st.sampled_from([8, 24]),
    num_groups=st.integers(1, 3),
    group_size=st.sampled_from(GROUP_SIZES),
    scale=st.floats(1e-4, 1e3),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_error_is_half_a_level(
    out_features: int, num_groups: int, group_size: int, scale: float, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out_features, num_groups * group_size, generator=generator) + shift) * scale
    quantized = quantize(weight, group_size)
    assert (quantized.in_features, quantized.out_features, quantized.group_size) == (
        weight.shape[1],
        out_features,
        group_size,
    )
    assert quantized.qweight.shape == (weight.shape[1], out_features // 8)
    assert quantized.qzeros.shape == (num_groups, out_features // 8)
    assert quantized.scales.dtype == torch.float16
    groups = weight.unflatten(1, (num_groups, group_size))
    level = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
    # fp16 below its normal range has steps of 2^-24, half of which a scale may be off.
    bound = MAX_ERROR_LEVELS * level + 15 * 2.0**-25
    error = (dequantize(quantized) - weight).abs().unflatten(1, (num_groups, group_size)).amax(-1)
    assert (error <= 1.001 * bound).all(), (error / level).max()


@pytest.mark.parametrize("value", [0.0, 0.37, -2.5, 1e-9])
def test_a_constant_group(value: float) -> None:
    weight = torch.full((8, 64), value)
    weight[:, 32:] = 1.0
    restored = dequantize(quantize(weight, 32))
    assert restored[:, :32] == pytest.approx(value, rel=2.0**-11, abs=2.0**-24)
    assert restored[:, 32:] == pytest.approx(1.0, rel=2.0**-11)


def test_what_can_be_said_in_levels_comes_back_unchanged() -> None:
    levels = torch.randint(0, 16, (64, 16))
    levels[0], levels[32], levels[1], levels[33] = 0, 0, 15, 15
    zeros, scales = torch.randint(0, 16, (2, 16)), torch.rand(2, 16).add(0.5).half()
    weight = AwqWeight(pack_nibbles(levels), pack_nibbles(zeros), scales)
    again = quantize(dequantize(weight), 32)
    assert again.qweight.equal(weight.qweight)
    assert again.qzeros.equal(weight.qzeros)
    assert again.scales.equal(scales)


def test_dequantised_by_the_formula() -> None:
    levels, zeros = torch.randint(0, 16, (64, 8)), torch.randint(0, 16, (2, 8))
    scales = torch.rand(2, 8).half()
    weight = dequantize(AwqWeight(pack_nibbles(levels), pack_nibbles(zeros), scales))
    assert weight.shape == (8, 64)
    for n, k in [(0, 0), (7, 31), (3, 32), (5, 63)]:
        assert weight[n, k].item() == (levels[k, n] - zeros[k // 32, n]).item() * scales[k // 32, n].item()
    halved = dequantize(AwqWeight(pack_nibbles(levels), pack_nibbles(zeros), scales), torch.float16)
    assert halved.equal(weight.half())


def test_a_clipped_group_saturates() -> None:
    weight = torch.randn(8, 32)
    weight[:, 5] = 40.0
    minimum, maximum = torch.full((8, 1), -1.5), torch.full((8, 1), 1.5)
    restored = dequantize(quantize_groups(weight, minimum, maximum))
    scale, zero = group_params(minimum, maximum)
    assert restored[:, 5] == pytest.approx(scale[0].item() * (15 - zero[0].item()))
    inside = weight.abs() < 1.4
    assert (restored - weight)[inside].abs().max() <= 0.1 * (1 + 2.0**-7)


@pytest.mark.parametrize(
    ("shape", "group_size", "message"),
    [
        ((8, 64), 48, "group_size=48 must be one of 32, 64, 128"),
        ((8, 576), 128, "group_size=128 does not divide the input width"),
        ((12, 64), 32, "multiple of 8"),
    ],
)
def test_a_shape_that_does_not_fit(shape: tuple[int, int], group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(torch.randn(shape), group_size)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e7])
def test_a_weight_without_a_scale(value: float) -> None:
    weight = torch.randn(8, 64)
    weight[3, 40] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, 32)
