"""What the host tells the device about a step, as one packed array and one copy.

The head has one place for every running sequence, at addresses that never change, so that CUDA graphs read it in place.
The tail holds what varies in length: the tokens of the step and the new entries of the block tables. On a CPU host and
device arrays are the same memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

# Steps that may be in flight at once, and one more that is being built.
NUM_BUFFERS = 3
_ALIGNMENT = 4  # int32 words: vector loads want 16 bytes


class HostHead(NamedTuple):
    """Views of the head that the host writes. By row of the step, but for `params` and `seeds`, by slot."""

    context_lens: np.ndarray  # [max_num_seqs] int32, decodes first, then prefills; 0 pads
    seq_slots: np.ndarray  # [max_num_seqs] int32, where each sequence's block table is
    cu_seqlens_q: np.ndarray  # [max_num_seqs + 1] int32, of the prefills
    logits_rows: np.ndarray  # [max_num_seqs] int32, the token of each sampling sequence whose logits are wanted
    sample_slots: np.ndarray  # [max_num_seqs] int32, -1 pads
    sample_positions: np.ndarray  # [max_num_seqs] int32, index of the token to draw in its sequence
    params: np.ndarray  # [NUM_PARAMS, max_num_seqs] fp32 or int32 bits, rows as SamplingState names them
    seeds: np.ndarray  # [max_num_seqs] int64


class DeviceHead(NamedTuple):
    """The same on the device."""

    context_lens: torch.Tensor
    seq_slots: torch.Tensor
    cu_seqlens_q: torch.Tensor
    logits_rows: torch.Tensor
    sample_slots: torch.Tensor
    sample_positions: torch.Tensor
    params: torch.Tensor
    seeds: torch.Tensor


class Tail(NamedTuple):
    """Where the parts of the tail begin, in words, and how long they are."""

    num_tokens: int
    num_writes: int
    offsets: tuple[int, int, int, int, int]  # token ids, positions, slots, table indices, blocks
    end: int


NUM_PARAMS = 7


class StepStaging:
    """A ring of pinned arrays on the host and one array on the device, of int32 words."""

    def __init__(self, *, max_num_seqs: int, max_num_tokens: int, max_table_writes: int, device: torch.device) -> None:
        self._sizes = (
            max_num_seqs,
            max_num_seqs,
            max_num_seqs + 1,
            max_num_seqs,
            max_num_seqs,
            max_num_seqs,
            NUM_PARAMS * max_num_seqs,
            2 * max_num_seqs,
        )
        self._head_words = sum(map(_aligned, self._sizes))
        num_words = self._head_words + 3 * _aligned(max_num_tokens) + 2 * _aligned(max_table_writes)
        self._is_cpu = device.type == "cpu"
        self.device_words = torch.zeros(num_words, dtype=torch.int32, device=device)
        if self._is_cpu:
            self._host_words = [self.device_words]
        else:
            self._host_words = [torch.zeros(num_words, dtype=torch.int32).pin_memory() for _ in range(NUM_BUFFERS)]
        self._heads = [self._host_head(words) for words in self._host_words]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._host_words)
        self._current = 0
        views = [self.device_words[start : start + size] for start, size in self._head_ranges()]
        params, seeds = views[6].view(NUM_PARAMS, max_num_seqs), views[7].view(torch.int64)
        self.device_head = DeviceHead._make([*views[:6], params, seeds])

    def begin(self) -> HostHead:
        """The head of the next step's array, all rows set to padding. Fill it and the tail, then call `send`."""
        self._current = (self._current + 1) % len(self._host_words)
        copied = self._copied[self._current]
        if copied is not None:
            copied.synchronize()
        head = self._heads[self._current]
        head.context_lens.fill(0)
        head.seq_slots.fill(0)
        head.sample_slots.fill(-1)
        return head

    def plan_tail(self, num_tokens: int, num_writes: int) -> Tail:
        """Lay the tail out for this step."""
        start, tokens, writes = self._head_words, _aligned(num_tokens), _aligned(num_writes)
        offsets = (start, start + tokens, start + 2 * tokens, start + 3 * tokens, start + 3 * tokens + writes)
        tail = Tail(num_tokens, num_writes, offsets, offsets[4] + writes)
        assert tail.end <= len(self.device_words), "a step larger than its limits"
        return tail

    def host_tail(self, tail: Tail) -> list[np.ndarray]:
        """The five arrays of the tail, int32, to be filled by the host."""
        words = self._host_words[self._current].numpy()
        return [words[start : start + size] for start, size in _tail_ranges(tail)]

    def device_tail(self, tail: Tail) -> list[torch.Tensor]:
        """The same on the device, once sent."""
        return [self.device_words[start : start + size] for start, size in _tail_ranges(tail)]

    def send(self, tail: Tail) -> None:
        """Copy head and tail to the device, in the order of the current stream, without waiting."""
        if self._is_cpu:
            return
        self.device_words[: tail.end].copy_(self._host_words[self._current][: tail.end], non_blocking=True)
        event = self._copied[self._current] or torch.cuda.Event()
        event.record()
        self._copied[self._current] = event

    def _host_head(self, words: torch.Tensor) -> HostHead:
        array = words.numpy()
        views = [array[start : start + size] for start, size in self._head_ranges()]
        return HostHead._make([*views[:6], views[6].reshape(NUM_PARAMS, -1), views[7].view(np.int64)])

    def _head_ranges(self) -> list[tuple[int, int]]:
        ranges, start = [], 0
        for size in self._sizes:
            ranges.append((start, size))
            start += _aligned(size)
        return ranges


def _tail_ranges(tail: Tail) -> list[tuple[int, int]]:
    sizes = (tail.num_tokens,) * 3 + (tail.num_writes,) * 2
    return list(zip(tail.offsets, sizes, strict=True))


def _aligned(num_words: int) -> int:
    return -(-num_words // _ALIGNMENT) * _ALIGNMENT
