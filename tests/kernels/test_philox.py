"""Philox against Triton's own, and the Gumbel noise made of it."""

import pytest
import torch

from tritonmind.kernels import gumbel_noise, philox_uniform
from tritonmind.kernels.philox import philox

SEEDS = [0, 1, -1, 2**31, 2**32 + 5, -(2**63), 0x0123456789ABCDEF]


def test_known_answers() -> None:
    """The vectors that the authors of Philox publish for 4x32 with 10 rounds."""
    ones = torch.tensor(0xFFFFFFFF)
    assert [hex(int(word)) for word in philox(torch.tensor(0), (torch.tensor(0),) * 4)] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    assert [hex(int(word)) for word in philox(torch.tensor(-1), (ones,) * 4)] == [
        "0x408f276d",
        "0x41c83b0e",
        "0xa20bc7c6",
        "0x6d5451fd",
    ]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equals_triton(device: str) -> None:
    pytest.importorskip("triton")
    from tests.kernels.rand_kernel import triton_rand

    seeds = torch.tensor(SEEDS, dtype=torch.int64)
    offsets = torch.randint(-(2**63), 2**63 - 1, (len(SEEDS), 37))
    offsets[:, :4] = torch.tensor([0, 1, 2**32 - 1, 2**32])
    expected = triton_rand(seeds.to(device), offsets.to(device)).cpu()
    actual = philox_uniform(seeds, offsets)
    assert torch.equal(actual, expected)
    assert actual.min() >= 0 and actual.max() < 1


def test_gumbel_is_philox_by_token() -> None:
    """Token t is word t % 4 of counter (t // 4, position): the definition, one number at a time."""
    seed, position = torch.tensor(-77), torch.tensor(12)
    noise = gumbel_noise(seed.view(1), position.view(1), 10)[0]
    for token in range(10):
        word = philox(seed, (torch.tensor(token // 4), position, torch.tensor(0), torch.tensor(0)))[token % 4].item()
        folded = word if word < 2**31 else 2**32 - 1 - word
        uniform = torch.tensor(folded, dtype=torch.float32) * 4.6566127342e-10
        assert torch.allclose(noise[token], -torch.log(-torch.log(uniform)), rtol=1e-6)


def test_gumbel_row_depends_on_seed_and_position_only() -> None:
    seeds, positions = torch.tensor([5, 5, -9, 5]), torch.tensor([3, 4, 3, 3])
    noise = gumbel_noise(seeds, positions, 1001)
    assert torch.equal(noise[0], noise[3])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert torch.equal(gumbel_noise(seeds[2:3], positions[2:3], 1001)[0], noise[2])
    assert torch.equal(gumbel_noise(seeds[:1], positions[:1], 64)[0], noise[0, :64])


def test_gumbel_distribution() -> None:
    noise = gumbel_noise(torch.arange(8), torch.arange(8), 50_000).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772157) < 0.01
    assert abs(noise.var() - 1.6449341) < 0.03


def test_gumbel_max_samples_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    num_draws = 20_000
    noise = gumbel_noise(torch.full((num_draws,), 1234), torch.arange(num_draws), len(logits))
    shares = torch.bincount((logits + noise).argmax(dim=1), minlength=len(logits)) / num_draws
    assert torch.allclose(shares, logits.softmax(0), atol=0.015)
