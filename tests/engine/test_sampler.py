"""Sampling on fixed logits: the exact distribution, the filters, and seeds that know nothing of their batch."""

from __future__ import annotations

import pytest
import torch

from tritonmind.engine.sampler import SamplingRow, keep_top_k, keep_top_p, sample
from tritonmind.messages import EngineRequest

# Upper 0.1 % points of chi-square, by degrees of freedom.
CHI_SQUARE_999 = {2: 13.82, 4: 18.47, 5: 20.52, 9: 27.88}
NUM_DRAWS = 20_000


def row(
    *, position: int = 0, seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> SamplingRow:
    return SamplingRow(
        EngineRequest(
            request_id=0,
            prompt_token_ids=[1],
            max_tokens=1,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_token_ids=[],
        ),
        position,
    )


def test_temperature_zero_is_the_largest_logit() -> None:
    logits = torch.randn(5, 40)
    assert sample(logits, [row(temperature=0.0)] * 5).tolist() == logits.argmax(-1).tolist()


def test_greedy_and_random_rows_mix() -> None:
    logits = torch.zeros(3, 8)
    logits[:, 5] = 50.0
    assert sample(logits, [row(temperature=0.0), row(temperature=1.0), row(temperature=0.5)]).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 10),
        ({"temperature": 0.5}, 10),
        ({"temperature": 1.7}, 10),
        ({"top_k": 3}, 3),
        ({"top_p": 0.9}, 6),
        ({"top_k": 5, "top_p": 0.95, "temperature": 1.3}, 5),
    ],
)
def test_draws_follow_the_exact_distribution(options: dict, kept: int) -> None:
    torch.manual_seed(0)  # a 0.1 % tail would fail one run in two hundred
    logits = torch.log(torch.tensor([0.30, 0.20, 0.15, 0.10, 0.08, 0.07, 0.04, 0.03, 0.02, 0.01]))[torch.randperm(10)]
    scores = logits / options.get("temperature", 1.0)
    if "top_k" in options:
        keep_top_k(scores, options["top_k"])
    if "top_p" in options:
        keep_top_p(scores, options["top_p"])
    probabilities = scores.softmax(0)
    support = probabilities > 0
    assert support.sum() == kept
    rows = [row(position=position, seed=1234, **options) for position in range(NUM_DRAWS)]
    counts = torch.bincount(sample(logits.expand(NUM_DRAWS, -1), rows), minlength=10)
    assert counts[~support].sum() == 0
    expected = probabilities[support] * NUM_DRAWS
    chi_square = float(((counts[support] - expected) ** 2 / expected).sum())
    assert chi_square < CHI_SQUARE_999[kept - 1]


def test_keep_top_k_keeps_ties_with_the_last() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    keep_top_k(scores, 2)
    assert torch.isfinite(scores).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.999, 4)])
def test_keep_top_p_keeps_the_smallest_sufficient_set(top_p: float, kept: int) -> None:
    scores = torch.log(torch.tensor([0.125, 0.5, 0.125, 0.25]))
    keep_top_p(scores, top_p)
    assert torch.isfinite(scores).sum() == kept and torch.isfinite(scores[1])


def test_a_seed_draws_the_same_alone_and_in_any_batch() -> None:
    logits = torch.randn(6, 500)
    rows = [row(position=3 + n, seed=2**63 + n, temperature=0.9, top_k=50, top_p=0.9) for n in range(6)]
    together = sample(logits, rows).tolist()
    assert together == [sample(logits[n : n + 1], [rows[n]]).item() for n in range(6)]
    order = [4, 0, 5, 2, 1, 3]
    assert sample(logits[order], [rows[n] for n in order]).tolist() == [together[n] for n in order]


def test_position_and_seed_both_change_the_draw() -> None:
    logits = torch.zeros(1, 5000)
    base = sample(logits, [row(seed=1, position=1)]).item()
    assert sample(logits, [row(seed=2, position=1)]).item() != base
    assert sample(logits, [row(seed=1, position=2)]).item() != base
    assert sample(logits, [row(seed=1 + 2**32, position=1)]).item() != base, "the high half of a seed counts"


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-39, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(1, 1000)
    logits[0, 700] = 9.0
    assert sample(logits, [row(temperature=temperature, top_k=50, top_p=0.9)]).tolist() == [700]
