"""The sampler's state: every option of a request reaches the draw, in its slot; penalties know prompt and answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.sampling_values import NEUTRAL
from tritonmind.engine.sampler import DRAWS, EDITS, LOGPROBS, Sampler
from tritonmind.engine.staging import StepStaging
from tritonmind.kernels import SamplingState, reference
from tritonmind.messages import EngineRequest
from tritonmind.sequence import Sequence

VOCAB = 50
NUM_SLOTS = 6
CPU = torch.device("cpu")
OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"top_k": 2},
    {"top_p": 0.2},
    {"min_p": 0.7},
    {"repetition_penalty": 5.0, "temperature": 0.0},
    {"presence_penalty": 2.0, "temperature": 0.0},
    {"frequency_penalty": 2.0, "temperature": 0.0},
]


def sequence(slot: int, prompt: list[int], generated: list[int], *, seed: int = 0, **options: Any) -> Sequence:
    request = EngineRequest(
        request_id=slot,
        prompt_token_ids=prompt,
        max_tokens=10,
        seed=seed,
        stop_token_ids=[],
        **{**NEUTRAL, **options},
    )
    seq = Sequence(request)
    seq.token_ids.extend(generated)
    seq.slot = slot
    return seq


class Harness:
    """A sampler and the staging that carries its options."""

    def __init__(self) -> None:
        self.staging = StepStaging(max_num_seqs=NUM_SLOTS, max_num_tokens=8, max_table_writes=8, device=CPU)
        self.sampler = Sampler(self.staging.device_head, vocab_size=VOCAB, max_num_seqs=NUM_SLOTS)

    def draw(self, logits: torch.Tensor, slots: list[int], positions: list[int], *, greedy: bool = False) -> list[int]:
        head = self.staging.begin()
        head.sample_slots[: len(slots)] = slots
        head.sample_positions[: len(slots)] = positions
        self.sampler.stage(head)
        self.staging.send_head()
        self.sampler.sample(logits, greedy=greedy)
        return self.staging.finish(self.sampler.token_ids, len(slots)).wait()


def expected_token(logits: torch.Tensor, seq: Sequence, position: int) -> int:
    """By the naive twin, from a state of one slot that is written out here."""
    request = seq.request
    counts = torch.zeros(1, VOCAB, dtype=torch.int32)
    for token_id in seq.token_ids[seq.num_prompt_tokens :]:
        counts[0, token_id] += 1
    for token_id in request.prompt_token_ids:
        counts[0, token_id] |= 1 << 30
    seed = request.seed - (1 << 64) if request.seed >= 1 << 63 else request.seed
    values = {name: getattr(request, name) for name in NEUTRAL}
    state = SamplingState(
        **{name: torch.tensor([value], dtype=torch.float32) for name, value in values.items() if name != "top_k"},
        top_k=torch.tensor([request.top_k], dtype=torch.int32),
        seed=torch.tensor([seed]),
        token_counts=counts,
    )
    zero, where = torch.zeros(1, dtype=torch.int32), torch.tensor([position], dtype=torch.int32)
    return int(reference.sample_tokens(logits.view(1, -1), zero, where, state)[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("slot", [0, 3, NUM_SLOTS - 1])
def test_each_option_reaches_the_draw_of_its_slot(options: dict[str, float], slot: int) -> None:
    harness = Harness()
    logits = 2 * torch.randn(1, VOCAB)
    best = int(logits.argmax())
    tokens = [best, best, int(logits.argmin())]
    for other in range(NUM_SLOTS):
        harness.sampler.admit(sequence(other, [1, 2], [3], seed=99))
    for position in range(10, 40):
        seq = sequence(slot, [5, *tokens], tokens, seed=2**63 + 7, **options)
        harness.sampler.admit(seq)
        assert harness.draw(logits, [slot], [position]) == [expected_token(logits, seq, position)]


def test_rows_find_their_slots_in_any_order() -> None:
    harness = Harness()
    seqs = [sequence(slot, [slot], [], seed=1000 + slot, **OPTIONS[slot]) for slot in range(NUM_SLOTS)]
    for seq in seqs:
        harness.sampler.admit(seq)
    logits = 2 * torch.randn(4, VOCAB)
    slots, positions = [4, 0, 5, 1], [7, 8, 9, 10]
    drawn = harness.draw(logits, slots, positions)
    assert drawn == [expected_token(logits[row], seqs[slot], positions[row]) for row, slot in enumerate(slots)]
    assert harness.sampler.last_token_ids[slots].tolist() == drawn
    assert harness.sampler.token_ids[:4].tolist() == drawn


def test_a_penalty_counts_what_was_drawn() -> None:
    """With a strong presence penalty a greedy draw never repeats, until all tokens have come."""
    harness = Harness()
    harness.sampler.admit(sequence(2, [1], [], temperature=0.0, presence_penalty=2.0))
    logits = torch.linspace(0, 1, VOCAB).view(1, -1)[:, torch.randperm(VOCAB)]
    drawn = [harness.draw(logits, [2], [n])[0] for n in range(VOCAB)]
    assert drawn == logits[0].argsort(descending=True).tolist()


def test_a_slot_forgets_who_had_it_before() -> None:
    harness = Harness()
    logits = torch.randn(1, VOCAB)
    options = {"temperature": 0.0, "repetition_penalty": 50.0}
    harness.sampler.admit(sequence(1, list(range(VOCAB)), [7] * 3, **options))
    harness.draw(logits, [1], [5])
    seq = sequence(1, [4], [], **options)
    harness.sampler.admit(seq)
    assert harness.draw(logits, [1], [5]) == [expected_token(logits, seq, 5)]


def test_a_batch_is_greedy_only_if_every_row_is() -> None:
    harness = Harness()
    harness.sampler.admit(sequence(0, [1], [], temperature=0.0))
    harness.sampler.admit(sequence(1, [1], [], temperature=0.5))
    harness.sampler.admit(sequence(2, [1], [], temperature=0.0, top_p=0.5))
    assert harness.sampler.wishes(np.array([0, 2])) == 0 and harness.sampler.wishes(np.array([0, 1])) == DRAWS
    logits = torch.randn(2, VOCAB)
    assert harness.draw(logits, [0, 2], [3, 3], greedy=True) == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("options", "wishes"),
    [
        ({"temperature": 0.0, "frequency_penalty": 0.1}, DRAWS),
        ({"temperature": 0.0, "logit_bias": [(3, 1.0)]}, EDITS),
        ({"temperature": 0.0, "bad_words": [[3]]}, EDITS),
        ({"temperature": 0.0, "min_tokens": 2}, EDITS),
        ({"temperature": 0.0, "num_logprobs": 0}, LOGPROBS),
        ({"min_tokens": 2, "num_logprobs": 3}, DRAWS | EDITS | LOGPROBS),
    ],
    ids=str,
)
def test_what_a_step_must_do_beside_the_largest_logit(options: dict[str, Any], wishes: int) -> None:
    """Of all slots asked for, and of no other; the next sequence in a slot has wishes of its own."""
    harness = Harness()
    for slot in range(3):
        harness.sampler.admit(sequence(slot, [1], [], temperature=0.0))
    harness.sampler.admit(sequence(1, [1], [], **options))
    assert harness.sampler.wishes(np.array([0, 2])) == 0
    assert harness.sampler.wishes(np.array([0, 1, 2])) == wishes
    harness.sampler.admit(sequence(1, [1], [], temperature=0.0))
    assert harness.sampler.wishes(np.array([0, 1, 2])) == 0
