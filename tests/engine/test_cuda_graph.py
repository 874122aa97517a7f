"""The buckets of decode graphs; the graphs themselves are tested on a GPU, in tests/models/test_llama_gpu.py."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tritonmind.engine.cuda_graph import batch_buckets


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 11, 64, 100, 256, 300, 512])
def test_buckets_grow_to_the_largest_batch(max_num_seqs: int) -> None:
    buckets = batch_buckets(max_num_seqs)
    assert buckets == sorted(set(buckets))
    assert buckets[0] == 1 and buckets[-1] == max_num_seqs
    assert all(larger <= 2 * smaller or larger - smaller <= 64 for smaller, larger in pairwise(buckets))
