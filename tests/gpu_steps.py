"""Steps for a ModelRunner without a scheduler: sequences whose K and V are random numbers in the cache."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from tritonmind.engine.decode_batch import NO_BLOCK, DecodeRows
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.engine.scheduler_output import ScheduledSequence, SchedulerOutput
from tritonmind.messages import EngineRequest
from tritonmind.sequence import Sequence, SequenceStatus

_admissions = itertools.count()


@torch.inference_mode()
def fill_cache(runner: ModelRunner) -> None:
    """Random K and V in every block."""
    for k_cache, v_cache, *_ in runner.kv_caches:
        k_cache.normal_()
        v_cache.normal_()


def sequences(lengths: list[int], num_blocks: int, *, block_size: int = 64, **options: Any) -> list[Sequence]:
    """Sequences of random tokens in slots of their own, with blocks of their own out of `num_blocks`."""
    blocks = torch.randperm(num_blocks).tolist()
    result = []
    for slot, length in enumerate(lengths):
        request = EngineRequest(
            request_id=slot,
            prompt_token_ids=torch.randint(3, 300, (length,)).tolist(),
            max_tokens=1,
            seed=slot,
            **{"stop_token_ids": [], "temperature": 0.0, "top_k": 0, "top_p": 1.0, **options},  # type: ignore[arg-type]
        )
        seq = Sequence(request)
        seq.slot, seq.admission, seq.status = slot, next(_admissions), SequenceStatus.RUNNING
        seq.block_table = [blocks.pop() for _ in range(-(-length // block_size))]
        result.append(seq)
    return result


def decode(seqs: list[Sequence]) -> SchedulerOutput:
    """Compute the last token of each and sample."""
    num_rows = len(seqs)
    rows = DecodeRows(
        seqs=seqs,
        request_ids=[seq.request_id for seq in seqs],
        slots=np.array([seq.slot for seq in seqs], dtype=np.int32),
        starts=np.array([len(seq.token_ids) - 1 for seq in seqs], dtype=np.int32),
        token_ids=np.array([seq.token_ids[-1] for seq in seqs], dtype=np.int32),
        new_blocks=np.full(num_rows, NO_BLOCK, dtype=np.int32),
        fresh=list(range(num_rows)),
        growing=[],
        filling=[],
        ending=[],
    )
    return SchedulerOutput(rows, [])


def prefills(items: list[ScheduledSequence]) -> SchedulerOutput:
    """A step of chunks only."""
    return SchedulerOutput(decode([]).decodes, items)


def prefill(seqs: list[Sequence], chunk: int) -> list[ScheduledSequence]:
    """Compute the last `chunk` tokens of each and sample."""
    return [ScheduledSequence(seq, len(seq.token_ids) - chunk, chunk, True) for seq in seqs]
