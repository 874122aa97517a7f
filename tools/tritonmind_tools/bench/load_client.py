"""One process of a load: `main` reads a Plan, says "ready", waits for "go", and writes what came of it.

A benchmark starts a few of these, because one Python process takes a few thousand messages a second. Everything that
can be made before is made before "ready"; times are of the clock that all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
import numpy as np

from tritonmind_tools.bench.endpoints import Endpoint, EndpointError, connect
from tritonmind_tools.bench.rounds import FIRST_PLAIN_TOKEN_ID

WARM_UP_TOKENS = 4


class Request(msgspec.Struct, frozen=True):
    """Lengths of one request. arrival: seconds after "go"; None is as soon as one of the plan's slots is free."""

    prompt_tokens: int
    output_tokens: int
    arrival: float | None = None


class Plan(msgspec.Struct, frozen=True):
    """What one process does. num_slots: how many requests without an arrival it has under way at once.

    seed: of the prompts; plans of one benchmark have different ones, so that no prompt comes twice.
    """

    url: str
    model: str
    requests: list[Request]
    num_slots: int
    vocab_size: int
    seed: str
    text_prompts: bool
    timeout_s: float


class Outcome(msgspec.Struct):
    """One request: when it should have been and was sent, and when which number of tokens came. error: "" is none.

    num_tokens: as the endpoint counts them, else the sum of counts. num_cached: prompt tokens out of a prefix cache.
    """

    prompt_tokens: int
    output_tokens: int
    due: float = 0.0
    sent: float = 0.0
    times: list[float] = msgspec.field(default_factory=list)
    counts: list[int] = msgspec.field(default_factory=list)
    num_tokens: int = 0
    num_cached: int = 0
    error: str = ""


class Share(msgspec.Struct):
    """What a process says at the end. cpu_s: of its wall time, both from "go" on."""

    outcomes: list[Outcome]
    cpu_s: float
    wall_s: float


class _Prepared(NamedTuple):
    body: bytes
    request: Request


def main() -> None:
    """Read a Plan as JSON, a line, from standard input, and "go" after "ready"; write a Share as JSON."""
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    share = asyncio.run(_run(plan))
    sys.stdout.buffer.write(msgspec.json.encode(share) + b"\n")


async def _run(plan: Plan) -> Share:
    async with connect(plan.url, plan.model) as endpoint:
        prepared = [
            _Prepared(_body(endpoint, plan, request, f"{plan.seed} {number}"), request)
            for number, request in enumerate(plan.requests)
        ]
        warm_up = Request(WARM_UP_TOKENS, WARM_UP_TOKENS)
        outcome = await _answer(endpoint, _Prepared(_body(endpoint, plan, warm_up, f"{plan.seed} warm"), warm_up), plan)
        _say(outcome.error or "ready")
        # Nothing else of this process is to be done meanwhile.
        if sys.stdin.buffer.readline() != b"go\n":
            raise SystemExit("told to leave")
        started, cpu = time.monotonic(), time.process_time()
        outcomes = await _load(lambda item: _answer(endpoint, item, plan, started), prepared, plan, started)
        return Share(outcomes, time.process_time() - cpu, time.monotonic() - started)


async def _load(
    answer: Callable[[_Prepared], Awaitable[Outcome]], prepared: list[_Prepared], plan: Plan, started: float
) -> list[Outcome]:
    waiting = iter([item for item in prepared if item.request.arrival is None])

    async def at_its_time(item: _Prepared) -> list[Outcome]:
        assert item.request.arrival is not None
        await asyncio.sleep(started + item.request.arrival - time.monotonic())
        return [await answer(item)]

    async def slot() -> list[Outcome]:
        return [await answer(item) for item in waiting]

    timed = [at_its_time(item) for item in prepared if item.request.arrival is not None]
    slots = [slot() for _ in range(plan.num_slots)]
    return [outcome for outcomes in await asyncio.gather(*timed, *slots) for outcome in outcomes]


async def _answer(endpoint: Endpoint, item: _Prepared, plan: Plan, started: float = 0.0) -> Outcome:
    """Send a request and take its answer to the end. A request that fails is an outcome too."""
    request = item.request
    outcome = Outcome(request.prompt_tokens, request.output_tokens)
    outcome.sent = time.monotonic()
    outcome.due = outcome.sent if request.arrival is None else started + request.arrival

    async def take() -> None:
        async for piece in endpoint.stream(item.body):
            total = piece.total_tokens or outcome.num_tokens + piece.num_tokens
            if piece.num_tokens:
                outcome.times.append(time.monotonic())
                outcome.counts.append(max(1, total - outcome.num_tokens))
            outcome.num_tokens = total
            outcome.num_cached = piece.num_cached or outcome.num_cached

    try:
        await asyncio.wait_for(take(), plan.timeout_s)
    except EndpointError as error:
        outcome.error = str(error)
    except asyncio.TimeoutError:
        outcome.error = f"no end of the answer within {plan.timeout_s:g} s"
    return outcome


def _body(endpoint: Endpoint, plan: Plan, request: Request, seed: str) -> bytes:
    if plan.text_prompts:
        draw = random.Random(seed)
        words = " ".join(draw.choice(WORDS) for _ in range(request.prompt_tokens))
        return endpoint.body(words, request.output_tokens)
    generator = np.random.default_rng(list(seed.encode()))
    ids = generator.integers(FIRST_PLAIN_TOKEN_ID, plan.vocab_size, request.prompt_tokens, dtype=np.int32)
    return endpoint.body(ids.tolist(), request.output_tokens)


# One token each, with the space before it, in common vocabularies.
WORDS = ("the", "of", "and", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at")


def _say(text: str) -> None:
    sys.stdout.write(text.replace("\n", " ") + "\n")
    sys.stdout.flush()
