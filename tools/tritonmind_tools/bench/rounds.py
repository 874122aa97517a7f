"""One round of a measurement: requests submitted to an engine all at once, and when their tokens came.

Greedy, past eos, prompts of random token ids that no other round has.
"""

from __future__ import annotations

import itertools
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tritonmind.errors import UnavailableError

if TYPE_CHECKING:
    from tritonmind.config import ModelConfig
    from tritonmind.engine.client import EngineClient
    from tritonmind.messages import EngineRequest, TokenOutput

FIRST_PLAIN_TOKEN_ID = 3  # below lie special tokens in common vocabularies
SEED = 0

Lengths = Sequence[tuple[int, int]]  # prompt and answer tokens of each request


class Steady(NamedTuple):
    """The steps in which all requests decode: how long one takes, how many there were, the mean tokens of a sequence.

    step_time: seconds.
    """

    step_time: float
    num_steps: int
    context: float


@dataclass(frozen=True)
class Round:
    """When tokens came, in seconds since the first request was submitted. In the order of `lengths`.

    arrivals: of each token of each request. token_ids: those tokens. wall: until the last one. step_cpu: seconds of CPU
    a step of the engine's thread, None for an engine that does not count them.
    """

    lengths: Lengths
    arrivals: list[list[float]]
    token_ids: list[list[int]]
    wall: float
    step_cpu: float | None = None

    @property
    def firsts(self) -> list[float]:
        """Times to the first token."""
        return [times[0] for times in self.arrivals]

    @property
    def lasts(self) -> list[float]:
        """Times to the last token."""
        return [times[-1] for times in self.arrivals]

    @property
    def gaps(self) -> list[float]:
        """Times between tokens, of all requests."""
        return [after - before for times in self.arrivals for before, after in itertools.pairwise(times)]

    def steady(self) -> Steady | None:
        """From the last request's first token until the first request's last one; None for less than two steps."""
        begin, end = max(self.firsts), min(self.lasts)
        latest = self.arrivals[self.firsts.index(begin)]
        steps = [moment for moment in latest[1:] if moment <= end]
        if len(steps) < 2:
            return None
        known = [sum(moment <= begin for moment in times) for times in self.arrivals]
        at_begin = sum(prompt + count for (prompt, _), count in zip(self.lengths, known, strict=True))
        context = at_begin / len(self.lengths) + (len(steps) - 1) / 2
        return Steady((steps[-1] - begin) / len(steps), len(steps), context)


class _Arrivals:
    """Takes the outputs of a round on the client's thread."""

    def __init__(self, request_ids: Sequence[int]) -> None:
        self.times: dict[int, list[float]] = {request_id: [] for request_id in request_ids}
        self.token_ids: dict[int, list[int]] = {request_id: [] for request_id in request_ids}
        self.ended = threading.Event()
        self.error: str | None = None
        self._num_live = len(request_ids)

    def take(self, output: TokenOutput) -> None:
        now = time.perf_counter()
        self.times[output.request_id].extend([now] * len(output.token_ids))
        self.token_ids[output.request_id].extend(output.token_ids)
        if output.finish_reason is not None:
            self.error = self.error or output.error
            self._num_live -= 1
            if self._num_live == 0 or self.error:
                self.ended.set()


def run_round(client: EngineClient, model: ModelConfig, lengths: Lengths, *, seed: str) -> Round:
    """Submit a request for each of `lengths` and wait for all. The same seed draws the same prompts.

    Raises UnavailableError with the engine's words when it fails.
    """
    prompts = random_prompts(model, [prompt for prompt, _ in lengths], seed)
    first_id = client.next_request_id(len(lengths))
    requests = [
        greedy_request(first_id + number, prompt, answer)
        for number, (prompt, (_, answer)) in enumerate(zip(prompts, lengths, strict=True))
    ]
    arrivals = _Arrivals([request.request_id for request in requests])
    before = client.stats()
    started = time.perf_counter()
    client.submit_all(requests, arrivals.take)
    arrivals.ended.wait()
    if arrivals.error:
        raise UnavailableError(f"the engine failed during the measurement: {arrivals.error}")
    after = client.stats()
    times = [[moment - started for moment in arrivals.times[request.request_id]] for request in requests]
    assert [len(moments) for moments in times] == [answer for _, answer in lengths]
    token_ids = [arrivals.token_ids[request.request_id] for request in requests]
    num_steps = max(1, after.num_steps - before.num_steps)
    step_cpu = (after.step_cpu_s - before.step_cpu_s) / num_steps
    return Round(lengths, times, token_ids, max(moments[-1] for moments in times), step_cpu)


def random_prompts(model: ModelConfig, prompt_lens: Sequence[int], seed: str = "") -> list[list[int]]:
    """Prompts of plain random token ids, the same for the same seed."""
    import numpy as np

    draw = np.random.default_rng([SEED, zlib.crc32(seed.encode())])
    ids = draw.integers(FIRST_PLAIN_TOKEN_ID, model.vocab_size, sum(prompt_lens))
    return [part.tolist() for part in np.split(ids, np.cumsum(prompt_lens)[:-1])]


def greedy_request(request_id: int, prompt: list[int], max_tokens: int) -> EngineRequest:
    """A request that takes the likeliest token `max_tokens` times, whatever it is."""
    from tritonmind.messages import EngineRequest

    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        stop_token_ids=[],
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between neighbours."""
    import numpy as np

    return float(np.percentile(values, percent))
