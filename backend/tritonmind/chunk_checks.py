"""Checks the files of a workspace by threads, a little ahead of whoever reads them.

Reading and hashing are the threads' work, so a reader finds in memory what it is about to copy. How far they are ahead
is bounded: a model larger than the host's memory would otherwise be read twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from tritonmind.errors import WorkspaceError
from tritonmind.weight_files import CONVERT_AGAIN, FileEntry, check_chunk, num_chunks

# A core does 1 to 1.4 GB/s of SHA-256: so many keep up with a cached file.
MAX_THREADS = 12
# Whoever copies what was checked fills buffers at 16 GB/s with so many threads, faster than disks read. More would take
# the cores from the checks, for OpenMP's threads wait for their next copy by spinning.
MAX_COPY_THREADS = 4
# Chunks that are being read or have been read and not yet asked for.
_AHEAD = 2 * MAX_THREADS
_LENGTH_BYTES = 8


class ChunkChecks:
    """A context manager. files: those that will be read, in that order, with what the index says of them."""

    def __init__(self, files: Mapping[Path, FileEntry], chunk_bytes: int) -> None:
        self._files = dict(files)
        self._chunk_bytes = chunk_bytes
        self._chunks = [(path, number) for path, entry in files.items() for number in range(len(entry.sha256))]
        self._first: dict[Path, int] = {}
        for position, (path, _) in enumerate(self._chunks):
            self._first.setdefault(path, position)
        self._running: list[Future[None]] = []
        self._num_checked = 0
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))), "verify")

    def __enter__(self) -> ChunkChecks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def wait(self, path: Path, end: int) -> None:
        """Until the first `end` bytes of the file, and the files before it, are known to be what the index says.

        Raises WorkspaceError naming the file and the place.
        """
        wanted = self._first[path] + num_chunks(end, self._chunk_bytes)
        for path_, number in self._chunks[len(self._running) : wanted + _AHEAD]:
            check = self._pool.submit(check_chunk, path_, self._files[path_], self._chunk_bytes, number)
            self._running.append(check)
        while self._num_checked < wanted:
            self._running[self._num_checked].result()
            self._num_checked += 1

    def data_ends(self, path: Path) -> dict[str, int]:
        """Where each tensor of a safetensors file ends in it, by the file's checked header. Raises WorkspaceError."""
        size = self._files[path].size
        with path.open("rb") as file:
            begin = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
            self.wait(path, min(begin, size))
            try:
                header = json.loads(file.read(min(begin, size) - _LENGTH_BYTES))
                return {n: begin + spec["data_offsets"][1] for n, spec in header.items() if n != "__metadata__"}
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise WorkspaceError(f"{path} has no header of a safetensors file ({error}): {CONVERT_AGAIN}") from None


@contextmanager
def few_copy_threads() -> Iterator[None]:
    """Within it torch has num_copy_threads() threads at most, in the thread that entered."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, num_copy_threads()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def num_copy_threads() -> int:
    """A quarter of the cores that this process may use, at least 1 and at most MAX_COPY_THREADS."""
    return max(1, min(MAX_COPY_THREADS, len(os.sched_getaffinity(0)) // 4))
