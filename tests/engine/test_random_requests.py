"""Requests of every kind in one engine that is short of everything: each has the answer that it gets alone."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
import torch

from tests.workspaces import tiny_workspace
from tritonmind.engine.core import EngineCore
from tritonmind.messages import EngineRequest, GuidedDecoding, TokenOutput
from tritonmind.sampling_params import siblings
from tritonmind.workspace import Workspace

EOS, VOCAB, MAX_MODEL_LEN, NUM_ARRIVALS = 2, 320, 150, 16
# Rounding depends on what shares a step. No draw of this model is that close on a CPU, but int8 makes a step of it.
MAX_OTHERS = 3
OPTIONS: list[dict[str, Any]] = [
    {},
    {},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.8, "min_p": 0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0.5, "logit_bias": [(7, 4.0), (9, -3.0)], "num_logprobs": 3},
    {"bad_words": [[number] for number in range(40, 90)] + [[5, 6], [8, 9, 10]], "min_tokens": 3},
    {"num_prompt_logprobs": 2, "num_logprobs": 0},
    {"guided": GuidedDecoding(kind="regex", spec="(?s)[^a]{24}"), "num_logprobs": 1},
    {"guided": GuidedDecoding(kind="regex", spec=r"\d{3}-\d{4}"), "temperature": 1.0},
]


class Outcome:
    """What came of one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.prompt_logprobs: list[float] = []
        self.last: TokenOutput | None = None

    def take(self, output: TokenOutput) -> None:
        assert self.last is None, "an output after the last one"
        self.token_ids += output.token_ids
        self.logprobs += [value.logprob for value in output.logprobs or ()]
        self.prompt_logprobs += [value.logprob for value in output.prompt_logprobs or () if value is not None]
        if output.finish_reason is not None:
            self.last = output

    @property
    def end(self) -> tuple[object, ...]:
        assert self.last is not None
        assert self.last.error is None
        return self.token_ids, self.last.finish_reason, self.last.stop_token_id


def _request(draw: random.Random, number: int) -> EngineRequest:
    # Half of the prompts share prefixes.
    prompt = [5] * draw.randrange(1, 70) if draw.random() < 0.5 else [draw.randrange(3, VOCAB) for _ in range(40)]
    prompt += [draw.randrange(3, 6) for _ in range(draw.randrange(4))]
    options = draw.choice(OPTIONS)
    neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    return EngineRequest(
        request_id=number,
        prompt_token_ids=prompt,
        max_tokens=draw.choice([3, 30, 70]),
        seed=draw.randrange(1 << 64),
        stop_token_ids=[EOS] if "guided" in options else [draw.randrange(VOCAB) for _ in range(draw.choice([1, 20]))],
        priority=draw.randrange(2),
        **{**neutral, **options},
    )


def _take(outcomes: dict[int, Outcome], outputs: Iterable[TokenOutput]) -> None:
    for output in outputs:
        outcomes[output.request_id].take(output)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("quant_policy", [0, 8])
def test_each_request_has_the_answer_that_it_gets_alone(
    tmp_path_factory: pytest.TempPathFactory, device: str, quant_policy: int
) -> None:
    """One step ahead, with preemption, shared prefixes, several answers to a prompt, aborts and cache resets."""
    source = Workspace.open(tiny_workspace(tmp_path_factory.mktemp("random"), head_dim=64, hidden=128, vocab=VOCAB))
    config = source.engine_config(
        device=device, async_depth=1, block_size=16, cache_max_entry_count=10, max_model_len=MAX_MODEL_LEN,
        max_num_seqs=5, max_num_batched_tokens=33, quant_policy=quant_policy, num_threads=1,
    )  # fmt: skip
    core = EngineCore(source, config)
    draw = random.Random(int(torch.randint(1 << 30, ()).item()))
    requests: dict[int, EngineRequest] = {}
    outcomes: dict[int, Outcome] = defaultdict(Outcome)
    aborted = set()
    # Two that begin together and outgrow the cache.
    for number, token_id in ((-1, 8), (-2, 9)):
        requests[number] = msgspec.structs.replace(
            _request(draw, number), prompt_token_ids=[token_id] * 75, max_tokens=30, stop_token_ids=[], guided=None
        )
        core.add(requests[number])
    for number in range(0, 3 * NUM_ARRIVALS, 3):
        for _ in range(draw.randrange(7)):
            _take(outcomes, core.step() if core.has_work else ())
            core.check_integrity()
        for request in siblings(_request(draw, number), draw.choice([1, 1, 1, 3])):
            requests[request.request_id] = request
            core.add(request)
        if draw.random() < 0.3:
            victim = draw.choice(list(requests))
            aborted.update({victim} if outcomes[victim].last is None else ())
            _take(outcomes, core.abort([victim]))
            core.check_integrity()
        if draw.random() < 0.1:
            core.reset_prefix_cache()
    while core.has_work:
        _take(outcomes, core.step())
        core.check_integrity()
    assert outcomes.keys() == requests.keys() and core.stats().num_preemptions

    num_others, tolerance = 0, 0.1 if quant_policy else 1e-2
    for number, request in requests.items():
        core.reset_prefix_cache()
        core.add(msgspec.structs.replace(request, parent_id=None))
        alone, together = Outcome(), outcomes[number]
        while core.has_work:
            for output in core.step():
                alone.take(output)
        length = len(together.token_ids)
        is_same = alone.token_ids[:length] == together.token_ids if number in aborted else alone.end == together.end
        num_others += not is_same
        if is_same:
            assert together.logprobs == pytest.approx(alone.logprobs[: len(together.logprobs)], abs=tolerance)
            assert len(together.logprobs) == (0 if request.num_logprobs is None else length)
            if length:
                assert together.prompt_logprobs == pytest.approx(alone.prompt_logprobs, abs=tolerance)
    assert num_others <= (0 if device == "cpu" and not quant_policy else MAX_OTHERS)
