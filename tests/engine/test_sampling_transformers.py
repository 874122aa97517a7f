"""Each sampling option beside Transformers' logits processors, on the same fixed logits.

A draw is compared as a distribution: 20 000 draws against the softmax of what Transformers makes of the logits. Edits
of single logits are compared value by value.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.sampling_values import NEUTRAL
from tritonmind.engine.logit_edits import LogitEditor
from tritonmind.engine.scheduler_output import ScheduledSequence
from tritonmind.kernels import PROMPT_FLAG, SamplingState, sample_tokens
from tritonmind.messages import EngineRequest
from tritonmind.sequence import Sequence

NUM_DRAWS = 20_000
PROBABILITIES = torch.tensor([0.30, 0.20, 0.15, 0.10, 0.08, 0.07, 0.04, 0.03, 0.02, 0.01])
VOCAB = len(PROBABILITIES)
PROMPT, GENERATED = [1, 4], [0, 4, 4, 7]
# 99.9 % of a chi-square distribution, by degrees of freedom.
CHI_SQUARE_999 = {0: 0.0, 1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88}
CASES: dict[str, tuple[dict[str, float], list[Any]]] = {
    "nothing": ({}, []),
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "high temperature": ({"temperature": 1.8}, [TemperatureLogitsWarper(1.8)]),
    "top_k": ({"top_k": 4}, [TopKLogitsWarper(4)]),
    "top_p": ({"top_p": 0.72}, [TopPLogitsWarper(0.72)]),
    "min_p": ({"min_p": 0.25}, [MinPLogitsWarper(0.25)]),
    "repetition_penalty": ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
    "all, in Transformers' order": (
        {"repetition_penalty": 1.3, "temperature": 1.4, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(7),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ],
    ),
}


def fixed_logits() -> torch.Tensor:
    """Shuffled, so that an id is no rank."""
    return PROBABILITIES.log()[torch.tensor([3, 9, 0, 6, 1, 8, 2, 5, 7, 4])]


def draws(logits: torch.Tensor, options: dict[str, float]) -> torch.Tensor:
    """How often each token was drawn at NUM_DRAWS positions with one seed."""
    counts = torch.zeros(VOCAB, dtype=torch.int32)
    for token_id in GENERATED:
        counts[token_id] += 1
    counts[PROMPT] |= PROMPT_FLAG
    values = {name: torch.full((NUM_DRAWS,), options.get(name, neutral)) for name, neutral in NEUTRAL.items()}
    values["top_k"] = values["top_k"].int()
    state = SamplingState(**values, seed=torch.full((NUM_DRAWS,), 1234), token_counts=counts.repeat(NUM_DRAWS, 1))
    rows = torch.arange(NUM_DRAWS, dtype=torch.int32)
    token_ids = sample_tokens(logits.repeat(NUM_DRAWS, 1), rows, rows, state)
    return torch.bincount(token_ids, minlength=VOCAB)


def assert_drawn_from(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    support = probabilities > 0
    assert counts[~support].sum() == 0, "a token was drawn that must not be"
    expected = probabilities[support] * NUM_DRAWS
    chi_square = float(((counts[support] - expected) ** 2 / expected).sum())
    assert chi_square <= CHI_SQUARE_999[int(support.sum()) - 1]


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_transformers_distribution(name: str) -> None:
    options, processors = CASES[name]
    logits = fixed_logits()
    processed = LogitsProcessorList(processors)(torch.tensor([PROMPT + GENERATED]), logits.clone().view(1, -1))
    assert_drawn_from(draws(logits, options), processed[0].softmax(0))


@pytest.mark.parametrize(
    "options", [{"presence_penalty": 1.2}, {"frequency_penalty": 0.6}, {"frequency_penalty": -0.4}]
)
def test_draws_follow_openais_formula(options: dict[str, float]) -> None:
    """logit - count * frequency_penalty - (count > 0) * presence_penalty, over the answer's tokens, as vLLM counts."""
    logits = fixed_logits()
    times = torch.bincount(torch.tensor(GENERATED), minlength=VOCAB)
    expected = logits - times * options.get("frequency_penalty", 0) - (times > 0) * options.get("presence_penalty", 0)
    assert_drawn_from(draws(logits, options), expected.softmax(0))


def edited(**options: Any) -> torch.Tensor:
    request = EngineRequest(
        request_id=0,
        prompt_token_ids=PROMPT,
        max_tokens=20,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        **{"stop_token_ids": [], **options},
    )
    seq = Sequence(request, arrival=0)
    seq.token_ids.extend(GENERATED)
    logits = fixed_logits().view(1, -1)
    edits = LogitEditor().plan([ScheduledSequence(seq, len(seq.token_ids) - 1, 1, True)])
    if edits is not None:
        edits.apply(logits, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    return logits


@pytest.mark.parametrize("num_more", [-1, 0, 1])
def test_min_tokens_is_transformers_min_new_tokens(num_more: int) -> None:
    min_tokens = len(GENERATED) + num_more
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), min_tokens, [2, 5], device="cpu")
    expected = processor(torch.tensor([PROMPT + GENERATED]), fixed_logits().view(1, -1))
    assert torch.equal(edited(min_tokens=min_tokens, stop_token_ids=[2, 5]), expected)


@pytest.mark.parametrize("words", [[[3]], [[4, 7, 9]], [[7, 2]], [[4, 2]], [[3], [7, 2], [0, 4, 4, 7, 1]]], ids=str)
def test_bad_words_are_transformers(words: list[list[int]]) -> None:
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=[])
    expected = processor(torch.tensor([PROMPT + GENERATED]), fixed_logits().view(1, -1))
    assert torch.equal(edited(bad_words=words), expected)


def test_logit_bias_is_a_sequence_bias_of_single_tokens() -> None:
    processor = SequenceBiasLogitsProcessor([[[3], 2.5], [[8], -100.0]])
    expected = processor(torch.tensor([PROMPT + GENERATED]), fixed_logits().view(1, -1))
    assert torch.equal(edited(logit_bias=[(3, 2.5), (8, -100.0)]), expected)
