"""Copies weights from a mapped file to the device, through a ring of pinned buffers on a stream of its own.

A copy from pageable memory is staged by the driver, one piece after another, with the host waiting. Here the host fills
one buffer (page faults and the copy, on all of torch's threads) while the others are on their way over the bus. Host
memory stays at the ring, and types are converted on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import torch

# Long enough that launching a copy costs nothing beside it (2.5 ms at 25 GB/s), short enough that even a small model
# fills several.
BUFFER_BYTES = 64 << 20
# One is filled, one is on its way, and one evens out their different speeds.
NUM_BUFFERS = 3


class WeightStream:
    """A context manager: what was copied within it is on the device when it ends.

    `num_bytes` counts what was copied, as it is stored.
    """

    def __init__(
        self, device: torch.device, *, buffer_bytes: int = BUFFER_BYTES, num_buffers: int = NUM_BUFFERS
    ) -> None:
        self.num_bytes = 0
        self._ring = _PinnedRing(device, buffer_bytes, num_buffers) if device.type == "cuda" else None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy `source`, on the CPU or already on the device, to `target` there: one shape, any dtypes and strides.

        The host's `source` has been read when this returns; `target` is complete when the context ends.
        """
        assert target.shape == source.shape, f"{tuple(source.shape)} does not fill {tuple(target.shape)}"
        self.num_bytes += source.nbytes
        if self._ring is None or source.device == target.device:
            target.copy_(source)
        else:
            self._ring.copy(target, source)

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ring is not None:
            self._ring.synchronize()


class _PinnedRing:
    """The buffers, each with the event of the copy that last read it."""

    def __init__(self, device: torch.device, buffer_bytes: int, num_buffers: int) -> None:
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(num_buffers)]
        self._read = [torch.cuda.Event() for _ in range(num_buffers)]
        self._stream = torch.cuda.Stream(device)
        self._num_pieces = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        # What the current stream still does with the target's memory comes first.
        self._stream.wait_stream(torch.cuda.current_stream(target.device))
        for target_piece, source_piece in pieces(target, source, self._buffers[0].nbytes):
            number = self._num_pieces % len(self._buffers)
            self._num_pieces += 1
            self._read[number].synchronize()  # returns at once for an event that was never recorded
            staged = self._buffers[number][: source_piece.nbytes].view(source_piece.dtype).view(source_piece.shape)
            staged.copy_(source_piece)
            with torch.cuda.stream(self._stream):
                if target_piece.dtype == staged.dtype and target_piece.is_contiguous():
                    target_piece.copy_(staged, non_blocking=True)
                else:  # torch would convert on the host, and wait
                    target_piece.copy_(staged.to(target_piece.device, non_blocking=True))
                self._read[number].record()

    def synchronize(self) -> None:
        """Wait on the host: the targets may then be used on any stream, and the buffers dropped."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._stream.synchronize()


def pieces(target: torch.Tensor, source: torch.Tensor, max_bytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut two tensors of one shape alike into views, of which those of `source` have at most `max_bytes`.

    Contiguous tensors are cut anywhere, others along their first dimension and, where a row is too long, within it.
    """
    if source.nbytes <= max_bytes:
        yield target, source
        return
    if target.is_contiguous() and source.is_contiguous():
        target, source = target.view(-1), source.view(-1)
    rows = max(1, max_bytes // source[0].nbytes)
    for target_piece, source_piece in zip(target.split(rows), source.split(rows), strict=True):
        if source_piece.nbytes > max_bytes:
            yield from pieces(target_piece[0], source_piece[0], max_bytes)
        else:
            yield target_piece, source_piece
