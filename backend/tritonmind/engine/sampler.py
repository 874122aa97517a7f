"""Draws the next tokens: keeps every running sequence's sampling options by slot, and calls the kernel with them.

The options travel to the device with each step's inputs. What a penalty must know of the tokens before is counted on
the device, so that no draw waits for the host.
"""

from __future__ import annotations

import numpy as np
import torch

from tritonmind.engine.staging import DeviceHead, HostHead
from tritonmind.kernels import PROMPT_FLAG, SamplingState, sample_tokens
from tritonmind.messages import EngineRequest
from tritonmind.sequence import Sequence

# What a request asks for beside the largest logit; a step does what one of its rows asks for.
DRAWS = 1
EDITS = 2
LOGPROBS = 4
GUIDED = 8  # to know the token before its own: which tokens are allowed follows from it


class Sampler:
    """Sampling state of `max_num_seqs` slots. Token counts are set up when a sequence with a penalty enters a slot."""

    def __init__(self, head: DeviceHead, *, vocab_size: int, max_num_seqs: int) -> None:
        device = head.params.device
        self._vocab_size = vocab_size
        # Rows in the order of SamplingState; int32 values in the same words as the fp32 ones.
        self._host_words = np.zeros(head.params.shape, dtype=np.int32)
        self._host_seeds = np.zeros(max_num_seqs, dtype=np.uint64)
        self._host_seed_bits = self._host_seeds.view(np.int64)
        self._wishes = np.zeros(max_num_seqs, dtype=np.uint8)
        as_float = head.params.view(torch.float32)
        self._last_token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._slots = head.sample_slots
        self._positions = head.sample_positions
        self._state = SamplingState(
            temperature=as_float[0],
            top_k=head.params[1],
            top_p=as_float[2],
            min_p=as_float[3],
            repetition_penalty=as_float[4],
            presence_penalty=as_float[5],
            frequency_penalty=as_float[6],
            seed=head.seeds,
            token_counts=torch.zeros((max_num_seqs, vocab_size), dtype=torch.int32, device=device),
        )

    @property
    def last_token_ids(self) -> torch.Tensor:
        """[max_num_seqs] int64: what was drawn last in each slot, on the device."""
        return self._last_token_ids

    @property
    def token_ids(self) -> torch.Tensor:
        """[max_num_seqs] int64: the last draw, by row of its step, on the device."""
        return self._token_ids

    def slots_and_last_token_ids(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of the step's first sampling rows [num_rows] int32, and what was drawn last by slot."""
        return self._slots[:num_rows], self._last_token_ids

    def admit(self, seq: Sequence) -> None:
        """Take over the options of a sequence that has just got its slot. All of its tokens must be known."""
        request, slot = seq.request, seq.slot
        floats, ints = self._host_words.view(np.float32), self._host_words
        floats[0, slot] = request.temperature
        ints[1, slot] = request.top_k
        floats[2, slot] = request.top_p
        floats[3, slot] = request.min_p
        floats[4, slot] = request.repetition_penalty
        floats[5, slot] = request.presence_penalty
        floats[6, slot] = request.frequency_penalty
        self._host_seeds[slot] = request.seed
        self._wishes[slot] = wishes_of(request)
        if request.has_penalty:
            self._count_tokens(seq)

    def stage(self, head: HostHead) -> None:
        """Write the options of all slots into a step's inputs."""
        head.params[:] = self._host_words
        head.seeds[:] = self._host_seed_bits

    def wishes(self, slots: np.ndarray) -> int:
        """What the requests in these slots ask for, together: DRAWS, EDITS, LOGPROBS and GUIDED, or 0."""
        return int(np.bitwise_or.reduce(self._wishes[slots]))

    def sample(self, logits: torch.Tensor, *, greedy: bool) -> torch.Tensor:
        """Draw from logits [R, vocab_size] for the step's first R sampling rows.

        Returns token ids [R] int64, valid until the next call.
        """
        num_rows = len(logits)
        return sample_tokens(
            logits,
            self._slots[:num_rows],
            self._positions[:num_rows],
            self._state,
            greedy=greedy,
            last_token_ids=self._last_token_ids,
            out=self._token_ids[:num_rows],
        )

    def _count_tokens(self, seq: Sequence) -> None:
        """What the penalties know of a sequence: its prompt, and what it had generated before it was preempted."""
        counts = np.zeros(self._vocab_size, dtype=np.int32)
        np.add.at(counts, seq.token_ids[seq.num_prompt_tokens :], 1)
        counts[seq.token_ids[: seq.num_prompt_tokens]] |= PROMPT_FLAG
        row = torch.from_numpy(counts)
        if self._token_ids.is_cuda:
            row = row.pin_memory()
        self._state.token_counts[seq.slot].copy_(row, non_blocking=True)


def wishes_of(request: EngineRequest) -> int:
    """What a request asks for beside the largest logit as the model computed it."""
    edits = request.logit_bias or request.bad_words or request.min_tokens
    return (
        (DRAWS if request.temperature != 0 or request.has_penalty else 0)
        | (EDITS if edits else 0)
        | (LOGPROBS if request.num_logprobs is not None else 0)
        | (GUIDED if request.guided is not None else 0)
    )
