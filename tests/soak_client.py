"""One process of many concurrent gRPC streams: `python -m tests.soak_client` reads a Plan, writes its Outcomes.

Tests start a few of these, because one Python process cannot take tokens as fast as a card makes them.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc import aio as grpc
from tritonclient.utils import np_to_triton_dtype

from tritonmind_tools.triton_client import MODEL_NAME

MAX_PROMPT, MAX_ANSWER = 900, 200
FIRST_PLAIN_TOKEN_ID = 3
CANCELLED_SHARE, PROBE_SHARE, SHARED_PREFIX_SHARE = 1 / 8, 1 / 8, 1 / 4
REQUEST_TIMEOUT_S = 120.0
SAMPLINGS: tuple[dict[str, float], ...] = (
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
)


class Probe(msgspec.Struct, frozen=True):
    """A greedy request whose answer is compared, with the number that names it."""

    number: int
    prompt: list[int]
    num_tokens: int


class Plan(msgspec.Struct, frozen=True):
    """What one process does: `num_streams` loops over random requests for `seconds`, probes among them."""

    address: str
    num_streams: int
    seconds: float
    seed: int
    vocab_size: int
    probes: list[Probe]


class Outcome(msgspec.Struct):
    """One request. Seconds since it was sent; num_finals is how many responses said to be the last."""

    num_asked: int
    token_ids: list[int] = msgspec.field(default_factory=list)
    num_finals: int = 0
    finish_reason: str = ""
    first_token: float = 0.0
    cancelled: bool = False
    probe: int | None = None
    error: str = ""


class Request(msgspec.Struct, frozen=True):
    """cancel_after: tokens after which to give it up, None to take all. They come several to a response."""

    prompt: list[int]
    num_tokens: int
    options: dict[str, float]
    cancel_after: int | None = None
    probe: int | None = None


def main() -> None:
    """Read a Plan as JSON from standard input, write the list of Outcomes as JSON to standard output."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(_run(plan))))


async def _run(plan: Plan) -> list[Outcome]:
    shared_prefix = _ids(random.Random(plan.seed), MAX_PROMPT, plan.vocab_size)
    deadline = time.monotonic() + plan.seconds

    async def stream(number: int) -> list[Outcome]:
        draw = random.Random(f"{plan.seed} {number}")
        outcomes = []
        while time.monotonic() < deadline:
            request = _draw_request(draw, plan, shared_prefix)
            outcomes.append(await asyncio.wait_for(answer(client, request), REQUEST_TIMEOUT_S))
        return outcomes

    async with grpc.InferenceServerClient(plan.address) as client:
        streams = await asyncio.gather(*(stream(number) for number in range(plan.num_streams)))
    return [outcome for outcomes in streams for outcome in outcomes]


def _ids(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    return [draw.randrange(FIRST_PLAIN_TOKEN_ID, vocab_size) for _ in range(count)]


def _draw_request(draw: random.Random, plan: Plan, shared_prefix: list[int]) -> Request:
    if plan.probes and draw.random() < PROBE_SHARE:
        probe = draw.choice(plan.probes)
        return Request(probe.prompt, probe.num_tokens, SAMPLINGS[0], probe=probe.number)
    prompt = _ids(draw, draw.randint(1, MAX_PROMPT), plan.vocab_size)
    if draw.random() < SHARED_PREFIX_SHARE:
        length = draw.randint(0, len(prompt) - 1)
        prompt[:length] = shared_prefix[:length]
    options = dict(draw.choice(SAMPLINGS))
    if options["temperature"] and draw.random() < 0.5:
        options["seed"] = draw.randrange(2**32)
    num_tokens = draw.randint(1, MAX_ANSWER)
    # 0 gives it up before the server can have answered.
    cancel_after = draw.randint(0, num_tokens // 2) if draw.random() < CANCELLED_SHARE else None
    return Request(prompt, num_tokens, options, cancel_after)


async def answer(client: grpc.InferenceServerClient, request: Request) -> Outcome:
    """Send a request and take its responses to the end of the stream, or until it is given up."""
    outcome = Outcome(num_asked=request.num_tokens, probe=request.probe)
    options = msgspec.json.encode({**request.options, "max_tokens": request.num_tokens, "ignore_eos": True})
    inputs = [
        _input("input_ids", np.array(request.prompt, dtype=np.int32)),
        _input("stream", np.array([True])),
        _input("sampling_parameters", np.array([options], dtype=np.object_)),
    ]

    async def one_request() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": MODEL_NAME, "inputs": inputs}

    started = time.monotonic()
    responses = client.stream_infer(one_request())
    cancel_after = request.cancel_after
    while True:
        if cancel_after is not None and len(outcome.token_ids) >= cancel_after and not outcome.num_finals:
            # A moment for the request to leave, else the earliest ones would never have been made.
            await asyncio.sleep(0.002)
            responses.cancel()
            outcome.cancelled = True
            return outcome
        try:
            result, error = await anext(responses)
        except StopAsyncIteration:
            return outcome
        if error is not None:
            outcome.error = str(error)
            return outcome
        outcome.first_token = outcome.first_token or time.monotonic() - started
        outcome.token_ids += result.as_numpy("token_ids").reshape(-1).tolist()
        outcome.finish_reason = b"".join(result.as_numpy("finish_reason").reshape(-1)).decode()
        outcome.num_finals += result.get_response().parameters["triton_final_response"].bool_param


def _input(name: str, array: np.ndarray) -> InferInput:
    tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


if __name__ == "__main__":
    main()
