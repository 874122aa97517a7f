"""What the host tells the device about a step, as one packed array and one copy, and the way back of what it draws.

The head has one place for every running sequence, at addresses that never change, so that CUDA graphs read it in place.
It is all that a step of decodes needs. The tail holds what varies in length: the tokens of other steps and entries of
the block tables. On a CPU host and device arrays are the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

# Steps that may be in flight at once, and one more that is being built: `begin` waits for the step so many before.
NUM_BUFFERS = 3
_ALIGNMENT = 4  # int32 words: vector loads want 16 bytes


class HostHead(NamedTuple):
    """Views of the head that the host writes. By row of the step, but for `params` and `seeds`, by slot."""

    context_lens: np.ndarray  # [max_num_seqs] int32, of the decodes; 0 pads
    seq_slots: np.ndarray  # [max_num_seqs] int32, where each decode's block table is
    prefill_context_lens: np.ndarray  # [max_num_seqs] int32; 0 pads
    prefill_slots: np.ndarray  # [max_num_seqs] int32
    cu_seqlens_q: np.ndarray  # [max_num_seqs + 1] int32, where each prefill's tokens begin in the step, and their end
    logits_rows: np.ndarray  # [max_num_seqs] int32, the token of each sampling sequence whose logits are wanted
    sample_slots: np.ndarray  # [max_num_seqs] int32, -1 pads
    sample_positions: np.ndarray  # [max_num_seqs] int32, index of the token to draw in its sequence
    token_ids: np.ndarray  # [max_num_seqs] int32, of a step of decodes only; -1: what was drawn last in the slot
    new_blocks: np.ndarray  # [max_num_seqs] int32, of a step of decodes only; -1: no new one
    params: np.ndarray  # [NUM_PARAMS, max_num_seqs] fp32 or int32 bits, rows as SamplingState names them
    seeds: np.ndarray  # [max_num_seqs] int64


class DeviceHead(NamedTuple):
    """The same on the device."""

    context_lens: torch.Tensor
    seq_slots: torch.Tensor
    prefill_context_lens: torch.Tensor
    prefill_slots: torch.Tensor
    cu_seqlens_q: torch.Tensor
    logits_rows: torch.Tensor
    sample_slots: torch.Tensor
    sample_positions: torch.Tensor
    token_ids: torch.Tensor
    new_blocks: torch.Tensor
    params: torch.Tensor
    seeds: torch.Tensor


class Tail(NamedTuple):
    """Where the parts of the tail begin, in words, and how long they are."""

    num_tokens: int
    num_writes: int
    offsets: tuple[int, int, int, int, int]  # token ids, positions, slots, table indices, blocks
    end: int


NUM_PARAMS = 7


@dataclass
class _Buffer:
    """The host's memory of one step."""

    words: torch.Tensor
    head_words: torch.Tensor
    head: HostHead
    token_ids: torch.Tensor
    host_token_ids: np.ndarray  # the same memory
    event: torch.cuda.Event | None  # after all copies of the step; None on a CPU
    members: object = None  # what the rows of the head are, as `begin` was told
    is_open: bool = False
    is_done: bool = True  # the event has been waited for

    def wait(self) -> None:
        """Block until the device is past the step."""
        if not self.is_done and self.event is not None:
            self.event.synchronize()
        self.is_done = True


class PendingDraw:
    """What a step has drawn, on its way to the host. To be read before as many steps as there are buffers begin."""

    __slots__ = ("_buffer", "_token_ids")

    def __init__(self, token_ids: np.ndarray, buffer: _Buffer) -> None:
        self._token_ids = token_ids
        self._buffer = buffer

    def wait(self) -> list[int]:
        """Block until the draw, and all else that the step sent before, is on the host. By row of the step."""
        self._buffer.wait()
        return self._token_ids.tolist()


class StepStaging:
    """A ring of pinned arrays on the host and one array on the device, of int32 words."""

    def __init__(self, *, max_num_seqs: int, max_num_tokens: int, max_table_writes: int, device: torch.device) -> None:
        self._sizes = (
            *(max_num_seqs,) * 4,
            max_num_seqs + 1,
            *(max_num_seqs,) * 5,
            NUM_PARAMS * max_num_seqs,
            2 * max_num_seqs,
        )
        self._head_words = sum(map(_aligned, self._sizes))
        num_words = self._head_words + 3 * _aligned(max_num_tokens) + 2 * _aligned(max_table_writes)
        self._is_cpu = device.type == "cpu"
        self.device_words = torch.zeros(num_words, dtype=torch.int32, device=device)
        views = [self.device_words[start : start + size] for start, size in self._head_ranges()]
        *others, params, seeds = views
        self.device_head = DeviceHead._make([*others, params.view(NUM_PARAMS, max_num_seqs), seeds.view(torch.int64)])
        self._device_head_words = self.device_words[: self._head_words]
        num_buffers = 1 if self._is_cpu else NUM_BUFFERS
        self._buffers = [self._make_buffer(max_num_seqs) for _ in range(num_buffers)]
        # The engine's thread has one stream: to ask for the current one costs as much as to record an event.
        self._stream = None if self._is_cpu else torch.cuda.current_stream(device)
        self._current = 0

    def begin(self, members: object = None) -> HostHead:
        """The head of the next step's array, all rows set to padding. Fill it, send the step, and `finish` it.

        members: what the rows are; `resume` finds them again.
        """
        self._current = (self._current + 1) % len(self._buffers)
        buffer = self._buffers[self._current]
        self._open(buffer)
        buffer.members = members
        head = buffer.head
        for part in head[: head._fields.index("sample_slots")]:
            part.fill(0)
        head.sample_slots.fill(-1)
        return head

    def resume(self, members: object) -> HostHead | None:
        """`begin`, if the last step of the next array had the same members: its head, as that step left it.

        None: it had others, and nothing is begun.
        """
        current = (self._current + 1) % len(self._buffers)
        buffer = self._buffers[current]
        if buffer.members is not members:
            return None
        self._current = current
        self._open(buffer)
        return buffer.head

    def finish(self, drawn: torch.Tensor, num_rows: int) -> PendingDraw:
        """Send what the step has drawn to the host, in the order of the current stream.

        drawn: [max_num_seqs] int64, copied as a whole, which costs no more. Returns its first rows.
        """
        buffer = self._buffers[self._current]
        buffer.is_open = False
        if buffer.event is None:
            return PendingDraw(drawn.numpy()[:num_rows].copy(), buffer)  # the next step overwrites it
        buffer.token_ids.copy_(drawn, non_blocking=True)
        buffer.event.record(self._stream)
        buffer.is_done = False
        return PendingDraw(buffer.host_token_ids[:num_rows], buffer)

    def send_head(self) -> None:
        """Copy the head to the device, in the order of the current stream, without waiting."""
        if not self._is_cpu:
            self._device_head_words.copy_(self._buffers[self._current].head_words, non_blocking=True)

    def plan_tail(self, num_tokens: int, num_writes: int) -> Tail:
        """Lay the tail out for this step."""
        start, tokens, writes = self._head_words, _aligned(num_tokens), _aligned(num_writes)
        offsets = (start, start + tokens, start + 2 * tokens, start + 3 * tokens, start + 3 * tokens + writes)
        tail = Tail(num_tokens, num_writes, offsets, offsets[4] + writes)
        assert tail.end <= len(self.device_words), "a step larger than its limits"
        return tail

    def host_tail(self, tail: Tail) -> list[np.ndarray]:
        """The five arrays of the tail, int32, to be filled by the host."""
        words = self._buffers[self._current].words.numpy()
        return [words[start : start + size] for start, size in _tail_ranges(tail)]

    def device_tail(self, tail: Tail) -> list[torch.Tensor]:
        """The same on the device, once sent."""
        return [self.device_words[start : start + size] for start, size in _tail_ranges(tail)]

    def send(self, tail: Tail) -> None:
        """Copy head and tail to the device, in the order of the current stream, without waiting."""
        if not self._is_cpu:
            words = self._buffers[self._current].words
            self.device_words[: tail.end].copy_(words[: tail.end], non_blocking=True)

    def _open(self, buffer: _Buffer) -> None:
        assert not buffer.is_open, "a step was begun and never finished"
        buffer.is_open = True
        buffer.wait()

    def _make_buffer(self, max_num_seqs: int) -> _Buffer:
        words = self.device_words
        if not self._is_cpu:
            words = torch.zeros(words.shape, dtype=words.dtype, pin_memory=True)
        array = words.numpy()
        views = [array[start : start + size] for start, size in self._head_ranges()]
        *others, params, seeds = views
        token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, pin_memory=not self._is_cpu)
        return _Buffer(
            words=words,
            head_words=words[: self._head_words],
            head=HostHead._make([*others, params.reshape(NUM_PARAMS, -1), seeds.view(np.int64)]),
            token_ids=token_ids,
            host_token_ids=token_ids.numpy(),
            event=None if self._is_cpu else torch.cuda.Event(),
        )

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
