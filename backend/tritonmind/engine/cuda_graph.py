"""CUDA graphs by bucket of sizes, so that a step costs the host one launch or, with its draw, two.

A step of n decodes runs in the smallest bucket of at least n rows, one with prompts in the smallest of at least as many
tokens, if it is within the limits below. What is beyond the step is padding: it writes no K and V (slot -1), attends to
nothing (context length 0, no queries), and nothing is drawn for it.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

NUM_WARM_UPS = 1  # compile the kernels, let cuBLAS take its workspace: neither may happen during a capture
# Of a step with prompts that a graph serves. Launching a larger one kernel by kernel takes the host less time than its
# kernels take the card, and a longer query run may have a kernel of its own.
MAX_TOKENS, MAX_PREFILLS, MAX_QUERY_LEN = 2048, 32, 1024


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: dense where a padding row costs much, `max_num_seqs` the largest."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, *range(320, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def token_buckets(max_num_tokens: int) -> list[int]:
    """Numbers of tokens that get a graph for steps with prompts, to whole tiles of the products' rows."""
    largest = min(MAX_TOKENS, max_num_tokens)
    return [size for size in (64, 128, 192, *range(256, largest, 128)) if size < largest] + [largest]


def bucket_of(buckets: list[int], size: int) -> int:
    """The smallest bucket of at least `size`."""
    return buckets[bisect.bisect_left(buckets, size)]


class GraphSet:
    """Captured calls of one function of the bucket. It must read and write the same memory each time.

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


class StepGraphs(NamedTuple):
    """What steps are made of on a GPU: most are one launch.

    decode_greedily: a step of decodes that ask for nothing but the largest logit. decode, draw: the parts of any other,
    between which its logits may be changed; a draw looks at what each row asks for, which may be the largest logit.
    prefill: what a step with prompts has instead of decode. Its buckets are of tokens, those of the others of rows.
    """

    decode_greedily: GraphSet
    decode: GraphSet
    draw: GraphSet
    prefill: GraphSet

    def capture(self, row_buckets: list[int], token_buckets: list[int], pool: Any) -> float:
        """Capture all buckets of all of them. Returns seconds taken."""
        by_rows = self.decode_greedily, self.decode, self.draw
        return self.prefill.capture(token_buckets, pool) + sum(each.capture(row_buckets, pool) for each in by_rows)
