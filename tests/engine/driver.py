"""Runs a scheduler over an arithmetic model, the way EngineCore does."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

from tests.engine.fakes import FakeExecutor, InputsExecutor
from tritonmind.config import SchedulerConfig
from tritonmind.engine.block_manager import BlockManager
from tritonmind.engine.scheduler import Scheduler
from tritonmind.messages import EngineRequest, TokenOutput

BLOCK = 4


def request(
    request_id: int,
    prompt: list[int],
    max_tokens: int,
    stop_token_ids: list[int] | None = None,
    *,
    priority: int = 0,
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        stop_token_ids=stop_token_ids or [],
        priority=priority,
    )


class Driver:
    """Runs a scheduler with `depth` steps in flight, as EngineCore does, and collects what comes out."""

    def __init__(
        self,
        *,
        num_blocks: int,
        depth: int,
        max_num_seqs: int = 4,
        budget: int = 8,
        caching: bool = True,
        max_model_len: int = 40,
        block_size: int = BLOCK,
        with_inputs: bool = False,
        holds_back: bool = False,
        rope_limits: tuple[int, ...] = (),
    ) -> None:
        config = SchedulerConfig(max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        self.manager = BlockManager(num_blocks, block_size, enable_prefix_caching=caching)
        self.scheduler = Scheduler(config, self.manager, holds_back=holds_back, rope_limits=rope_limits)
        self.executor: FakeExecutor | InputsExecutor = (
            InputsExecutor(num_blocks, block_size, config, rope_limits)
            if with_inputs
            else FakeExecutor(num_blocks, block_size, max_num_seqs)
        )
        self.depth = depth
        self.in_flight: deque = deque()
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.finals: dict[int, TokenOutput] = {}
        self.queue_times: dict[int, float] = {}

    def take(self, outputs: Iterable[TokenOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.finals, "an output after the last one"
            self.tokens[output.request_id].extend(output.token_ids)
            if output.queue_time_s is not None:
                assert output.request_id not in self.queue_times, "a queue time came twice"
                self.queue_times[output.request_id] = output.queue_time_s
            if output.finish_reason is not None:
                self.finals[output.request_id] = output

    def step(self) -> None:
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if output.num_tokens:
            self.in_flight.append((output, self.executor.execute(output)))
            if len(self.in_flight) <= self.depth:
                return
        if self.in_flight:
            due, handle = self.in_flight.popleft()
            self.take(self.scheduler.update(due, *handle.wait()))
            self.scheduler.check_integrity()

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.num_live and not self.in_flight:
                self.scheduler.check_integrity()
                assert self.manager.num_used_blocks == 0
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")
