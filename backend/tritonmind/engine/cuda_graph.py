"""The decode step as CUDA graphs, one a bucket of batch sizes, so that a step costs the host one launch.

A step of n decodes runs in the smallest bucket of at least n rows. The rows beyond n are padding: they write no K and V
(slot -1), attend to nothing (context length 0), and their logits are not looked at.
"""

from __future__ import annotations

import bisect
import time
from typing import NamedTuple

import torch

from tritonmind.model_inputs import AttentionMetadata, ModelInputs
from tritonmind.models.llama import KVCaches, LlamaForCausalLM

NUM_WARM_UPS = 2  # compile the kernels, let cuBLAS take its workspace: neither may happen during a capture


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: dense where a padding row costs much, `max_num_seqs` the largest."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, *range(320, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # [bucket, vocab_size], overwritten by each replay


class DecodeGraphs:
    """Captured decode steps of one model over one KV cache. Replays are in the order of the current stream."""

    def __init__(self, model: LlamaForCausalLM, kv_caches: KVCaches, *, max_num_seqs: int, max_blocks: int) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._buckets = batch_buckets(max_num_seqs)
        device = kv_caches[0][0].device
        self._token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._slot_mapping = torch.full((max_num_seqs,), -1, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device)
        self._context_lens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._rows = torch.arange(max_num_seqs, device=device)
        self._graphs: dict[int, _Graph] = {}

    def capture(self) -> float:
        """Capture every bucket, the largest first, so that the smaller ones reuse its memory. Returns seconds taken."""
        started = time.monotonic()
        pool = None
        for bucket in reversed(self._buckets):
            inputs = self._inputs(bucket)
            for _ in range(NUM_WARM_UPS):
                self._model(inputs, self._kv_caches)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = self._model(inputs, self._kv_caches)
            pool = pool or graph.pool()
            self._graphs[bucket] = _Graph(graph, logits)
        return time.monotonic() - started

    def run(self, inputs: ModelInputs) -> torch.Tensor:
        """Logits [num_decodes, vocab_size] of a step of decodes only, valid until the next run."""
        metadata = inputs.attention
        num_decodes = metadata.num_decodes
        assert num_decodes == len(inputs.token_ids), "only steps without prefills have a graph"
        bucket = self._buckets[bisect.bisect_left(self._buckets, num_decodes)]
        self._token_ids[:num_decodes].copy_(inputs.token_ids)
        self._positions[:num_decodes].copy_(inputs.positions)
        self._slot_mapping[:num_decodes].copy_(metadata.slot_mapping)
        self._slot_mapping[num_decodes:bucket].fill_(-1)
        self._context_lens[:num_decodes].copy_(metadata.decode_context_lens)
        self._context_lens[num_decodes:bucket].fill_(0)
        width = metadata.decode_block_tables.shape[1]
        self._block_tables[:num_decodes, :width].copy_(metadata.decode_block_tables)
        graph, logits = self._graphs[bucket]
        graph.replay()
        return logits[:num_decodes]

    def _inputs(self, bucket: int) -> ModelInputs:
        nothing = torch.zeros(0, dtype=torch.int32, device=self._rows.device)
        return ModelInputs(
            token_ids=self._token_ids[:bucket],
            positions=self._positions[:bucket],
            logits_rows=self._rows[:bucket],
            attention=AttentionMetadata(
                num_decodes=bucket,
                slot_mapping=self._slot_mapping[:bucket],
                decode_block_tables=self._block_tables[:bucket],
                decode_context_lens=self._context_lens[:bucket],
                prefill_block_tables=nothing.view(0, 0),
                prefill_context_lens=nothing,
                prefill_cu_seqlens_q=torch.zeros(1, dtype=torch.int32, device=self._rows.device),
                max_query_len=0,
            ),
        )
