"""Which tokens the guided rows of a step may draw: made on the host while the model runs, applied to its logits.

Only rows whose answer is guided have a mask and travel to the device; the others' logits are not touched.
"""

from __future__ import annotations

import torch

from tritonmind.engine.scheduler_output import ScheduledSequence
from tritonmind.kernels import mask_tokens, mask_words
from tritonmind.sequence import Sequence, SequenceStatus

ALL_ALLOWED = -1  # all bits of a word


class TokenMasks:
    """Masks of one step at a time: the device must be past a step when the next one's are made."""

    def __init__(self, *, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._num_words = mask_words(vocab_size)
        # All masks, and behind them the row of each: one copy of as much as there is.
        size = max_num_seqs * (self._num_words + 1)
        self._device_words = torch.zeros(size, dtype=torch.int32, device=device)
        self._host_words = (
            self._device_words if device.type == "cpu" else torch.zeros(size, dtype=torch.int32, pin_memory=True)
        )
        self._array = self._host_words.numpy()

    def apply(self, logits: torch.Tensor, sampling: list[ScheduledSequence]) -> list[Sequence]:
        """Forbid in the step's logits [R, V], in place, what its sampling rows may not draw.

        All tokens of live sequences must be known. Returns the guided sequences that cannot go on.
        """
        guided = [
            (row, item.seq)
            for row, item in enumerate(sampling)
            if item.seq.guide is not None and item.seq.status is not SequenceStatus.FINISHED
        ]
        if not guided:
            return []
        failed = self._fill([seq for _, seq in guided])
        num_masks = len(guided)
        num_mask_words = num_masks * self._num_words
        end = num_mask_words + num_masks
        self._array[num_mask_words:end] = [row for row, _ in guided]
        if logits.is_cuda:
            self._device_words[:end].copy_(self._host_words[:end], non_blocking=True)
        self._mask(logits, num_masks)
        return failed

    def warm_up(self, logits: torch.Tensor) -> None:
        """Run the kernel without an effect."""
        self._device_words.fill_(ALL_ALLOWED)
        self._device_words[self._num_words] = 0
        self._mask(logits, 1)

    def _mask(self, logits: torch.Tensor, num_masks: int) -> None:
        words, begin = self._device_words, num_masks * self._num_words
        mask_tokens(logits, words[begin : begin + num_masks], words[:begin].view(num_masks, self._num_words))

    def _fill(self, seqs: list[Sequence]) -> list[Sequence]:
        """Masks of these sequences, in their order. Returns those that cannot go on, which may draw anything."""
        words = self._array[: len(seqs) * self._num_words].reshape(len(seqs), self._num_words)
        address, pitch = words.ctypes.data, words.strides[0]
        failed = []
        # One by one: the library's threads, woken for some 10 us of work a row, took longer.
        for number, seq in enumerate(seqs):
            guide = seq.guide
            assert guide is not None
            guide.take(seq.token_ids[seq.num_prompt_tokens + guide.num_taken :])
            guide.write_mask(address + number * pitch, pitch)
            if guide.error is not None:
                words[number] = ALL_ALLOWED
                failed.append(seq)
        return failed
