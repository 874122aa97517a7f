"""CUDA graphs by bucket of batch sizes, so that a step of decodes costs the host one launch or, with its draw, two.

A step of n decodes runs in the smallest bucket of at least n rows. The rows beyond n are padding: they write no K and V
(slot -1), attend to nothing (context length 0), and nothing is drawn for them.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from typing import Any

import torch

NUM_WARM_UPS = 2  # compile the kernels, let cuBLAS take its workspace: neither may happen during a capture


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: dense where a padding row costs much, `max_num_seqs` the largest."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, *range(320, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def bucket_of(buckets: list[int], size: int) -> int:
    """The smallest bucket of at least `size`."""
    return buckets[bisect.bisect_left(buckets, size)]


class GraphSet:
    """Captured calls of one function of the batch size. It must read and write the same memory each time.

    Replays are in the order of the current stream. All sets of a runner share one memory pool: their replays must not
    overlap, and what one leaves for another lies outside the pool.
    """

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function = function
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self, buckets: list[int], pool: Any) -> float:
        """Capture every bucket, the largest first, so that the smaller ones reuse its memory. Returns seconds taken."""
        started = time.monotonic()
        for bucket in reversed(buckets):
            for _ in range(NUM_WARM_UPS):
                self._function(bucket)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._function(bucket)
            self._graphs[bucket] = graph
        return time.monotonic() - started

    def replay(self, bucket: int) -> None:
        """Run the captured call of a bucket."""
        self._graphs[bucket].replay()
