"""EngineCore: token ids in, token ids out. One thread calls it.

A step: schedule -> launch -> (with `async_depth` steps already in flight) wait for the oldest -> update. The outputs of
a step therefore come `async_depth` calls later; `step` keeps being called until nothing is live and nothing in flight.
The draw of a step with guided answers is launched after the update, by which the tokens before are known; meanwhile the
device computes the step's logits.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from tritonmind.config import EngineConfig, SchedulerConfig
from tritonmind.engine.block_manager import BlockManager
from tritonmind.engine.device import resolve_device
from tritonmind.engine.executor import Executor
from tritonmind.engine.guides import GuideQueue
from tritonmind.engine.model_runner import AUTOMATIC_BATCHED_TOKENS
from tritonmind.engine.scheduler import Scheduler
from tritonmind.engine.scheduler_output import SchedulerOutput
from tritonmind.engine.step_handle import StepHandle
from tritonmind.messages import EngineInfo, EngineRequest, EngineStats, FinishReason, StepOutputs, TokenOutput
from tritonmind.model_source import ModelSource

# How long a step that has nothing else to do waits for a grammar to be compiled.
GUIDE_WAIT_S = 0.01


class _InFlight(NamedTuple):
    output: SchedulerOutput
    handle: StepHandle


class EngineCore:
    """Scheduler, blocks and executor of one model."""

    def __init__(self, source: ModelSource, config: EngineConfig) -> None:
        limits = resolve_limits(config)
        self.config = config = dataclasses.replace(config, scheduler=limits)
        self._guides = GuideQueue(source)
        self._guides.prepare()  # while the model is loaded
        self.executor = Executor(source, config)
        runner = self.executor.runner
        self.block_manager = BlockManager(
            runner.memory_plan.num_blocks,
            config.cache.block_size,
            enable_prefix_caching=config.cache.enable_prefix_caching,
        )
        # Few tokens of prompts cost a step nearly as much as many: it unpacks all 4-bit weights, on cards other than
        # Hopper to memory; and without graphs the host takes long to launch it.
        is_dear = runner.device.type == "cuda" and (config.model.weight_type == "int4" or config.enforce_eager)
        self.scheduler = Scheduler(limits, self.block_manager, rope_limits=runner.rope_limits, holds_back=is_dear)
        self.async_depth = (
            (0 if runner.device.type == "cpu" else 1) if config.async_depth == "auto" else config.async_depth
        )
        self.info = EngineInfo(
            device=str(runner.device),
            dtype=str(runner.dtype).removeprefix("torch."),
            num_blocks=self.block_manager.num_blocks,
            block_size=config.cache.block_size,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_queue_size=limits.max_queue_size,
            quant_policy=int(config.cache.quant_policy),
            vocab_size=config.model.vocab_size,
            memory_plan=runner.memory_plan.describe(),
            memory_bytes=runner.memory_plan.parts(),
        )
        self._in_flight: deque[_InFlight] = deque()
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._num_finished = 0
        self._step_cpu_s = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.num_live > 0 or bool(self._in_flight) or len(self._guides) > 0

    def add(self, request: EngineRequest) -> None:
        """Queue a request that the client has validated, a guided one when its grammar is compiled."""
        if request.guided is None:
            self.scheduler.add(request)
        else:
            self._guides.add(request)

    def abort(self, request_ids: Iterable[int]) -> list[TokenOutput]:
        """End requests now; their last outputs. Unknown ids are ignored."""
        request_ids = list(request_ids)
        outputs = self.scheduler.abort(request_ids)
        for request in self._guides.remove(request_ids):
            outputs.append(_ended(request, "cancelled"))
        self._count(outputs)
        return outputs

    def step(self) -> StepOutputs:
        """Launch one step if anything can run, and give the outputs of the oldest one if it is due."""
        begin = time.thread_time()
        failed = self._add_guided() if self._guides else []
        output = self.scheduler.schedule()
        launched = self.executor.execute(output) if output.num_tokens > 0 else None
        if launched is not None:
            self._in_flight.append(_InFlight(output, launched))
            self._num_steps += 1
            if len(self._in_flight) == 1:
                failed += self._draw(launched)
        self._step_cpu_s += time.thread_time() - begin
        if launched is not None and len(self._in_flight) <= self.async_depth:
            return StepOutputs(outputs=failed)
        if not self._in_flight:
            assert self.scheduler.num_live == 0, "live sequences, but nothing can be scheduled"
            return StepOutputs(outputs=failed)
        due = self._in_flight.popleft()
        result = due.handle.wait()  # spins: no work of ours
        begin = time.thread_time()
        outputs = self.scheduler.update(due.output, *result)
        self._num_generated_tokens += len(outputs.token_ids)
        self._count(outputs.outputs)
        if launched is not None and self._in_flight:
            failed += self._draw(launched)
        outputs.outputs.extend(failed)
        self._step_cpu_s += time.thread_time() - begin
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes, as a benchmark wants between runs."""
        self.block_manager.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Re-derive all bookkeeping; AssertionError with what is wrong."""
        self.scheduler.check_integrity()
        if not self.has_work:
            assert self.block_manager.num_used_blocks == 0, "blocks in use, but no request is live"

    def stats(self) -> EngineStats:
        """A snapshot of queues, blocks and counters."""
        blocks = self.block_manager
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self._guides),
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free_blocks,
            num_cached_blocks=blocks.num_cached_blocks,
            num_used_blocks=blocks.num_used_blocks,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=self.scheduler.num_preemptions,
            num_finished=self._num_finished,
            num_jit_compiles=self.executor.runner.jit_alarm.num_compiles,
            step_cpu_s=self._step_cpu_s,
        )

    def _add_guided(self) -> list[TokenOutput]:
        """Queue the guided requests whose grammars are compiled. Returns the last outputs of those that have none."""
        idle = not self._in_flight and not self.scheduler.num_live
        outputs = []
        for request, guide, error in self._guides.take(GUIDE_WAIT_S if idle else 0.0):
            if guide is None:
                outputs.append(_ended(request, "error", error))
            else:
                self.scheduler.add(request, guide)
        self._count(outputs)
        return outputs

    def _draw(self, handle: StepHandle) -> list[TokenOutput]:
        """Launch a step's draw if it has waited. Returns the last outputs of guided requests that cannot go on."""
        outputs = []
        for seq in handle.draw():
            assert seq.guide is not None and seq.guide.error is not None
            outputs.append(self.scheduler.fail(seq, seq.guide.error))
        self._count(outputs)
        return outputs

    def _count(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            self._num_generated_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                self._num_finished += 1
                self._num_prompt_tokens += output.num_prompt_tokens
                self._num_cached_tokens += output.num_cached_tokens


def _ended(request: EngineRequest, reason: FinishReason, error: str | None = None) -> TokenOutput:
    """The only output of a request that never came to the scheduler."""
    return TokenOutput(
        request_id=request.request_id,
        token_ids=[],
        num_prompt_tokens=len(request.prompt_token_ids),
        finish_reason=reason,
        error=error,
    )


def resolve_limits(config: EngineConfig) -> SchedulerConfig:
    """The scheduler's limits with `max_num_batched_tokens` 0 replaced by the automatic value."""
    limits = config.scheduler
    if limits.max_num_batched_tokens:
        return limits
    automatic = max(AUTOMATIC_BATCHED_TOKENS[resolve_device(config.device).type], limits.max_num_seqs)
    return dataclasses.replace(limits, max_num_batched_tokens=automatic)
