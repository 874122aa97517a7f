"""Real weights behind the real Triton server: answers, load, cancels, shared prefixes."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server_fixture import assert_accounts, running
from tritonmind_tools.embedded_server import EmbeddedServer
from tritonmind_tools.triton_client import TritonClient

pytestmark = pytest.mark.server

NUM_STREAMS = 64
NUM_CANCELLED = 16
TOPICS = ("rivers", "trains", "bread", "winter", "the moon", "a lighthouse", "prime numbers", "whales")


@pytest.fixture(scope="module")
def server(smollm2_workspace: Path) -> Iterator[EmbeddedServer]:
    with running(smollm2_workspace) as server:
        yield server
    assert_accounts(server.log_path)


def stream_request(index: int) -> dict[str, Any]:
    """Prompts of 5 to about 80 tokens, answers of 4 to 15."""
    topic = TOPICS[index % len(TOPICS)]
    text = f"{index}. Write about {topic}. " + f"Mention {topic} and the number {index}. " * (index % 7)
    return {"text": text, "options": {"temperature": 0, "ignore_eos": True, "max_tokens": 4 + index * 7 % 12}}


def answer_text(address: str, request: dict[str, Any]) -> str:
    with TritonClient(address) as client:
        return "".join(delta.text for delta in client.generate(**request))


def test_it_knows_the_capital_of_france(server: EmbeddedServer) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with TritonClient(server.address) as client:
        deltas = list(client.generate(messages=messages, options={"temperature": 0, "max_tokens": 40}))
    assert "Paris" in "".join(delta.text for delta in deltas)
    assert len(deltas) > 1 and deltas[-1].finish_reason == "stop"


def test_64_streams_are_those_of_single_runs(server: EmbeddedServer) -> None:
    requests = [stream_request(index) for index in range(NUM_STREAMS)]
    cancelled = set(random.sample(range(NUM_STREAMS), NUM_CANCELLED))
    kept = [index for index in range(NUM_STREAMS) if index not in cancelled]
    alone = {index: answer_text(server.address, requests[index]) for index in kept}

    def one(index: int) -> str | None:
        if index not in cancelled:
            return answer_text(server.address, requests[index])
        with TritonClient(server.address) as client:
            answers = client.generate(text=requests[index]["text"], options={"ignore_eos": True, "max_tokens": 1000})
            # Some while they wait for their prompt's turn, some in the middle of their answer.
            timer = threading.Timer(random.uniform(0.05, 5), client.cancel)
            timer.start()
            assert list(answers)[-1].finish_reason == "cancelled"
            timer.join()
        return None

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        together = list(pool.map(one, range(NUM_STREAMS)))
    assert {index: together[index] for index in kept} == alone


def test_a_shared_prefix_of_1000_tokens_is_not_computed_again(server: EmbeddedServer) -> None:
    prefix = [300 + 7 * n % 4000 for n in range(1000)]

    def first_token(ending: list[int]) -> tuple[float, int]:
        with TritonClient(server.address) as client:
            begin = time.monotonic()
            deltas = client.generate(input_ids=prefix + ending, options={"temperature": 0, "max_tokens": 2})
            cached = next(deltas).num_cached_tokens
            seconds = time.monotonic() - begin
            deltas.close()
        return seconds, cached

    cold, cold_cached = first_token([40, 41])
    warm, warm_cached = first_token([50, 51])
    print(f"\ntime to first token of 1002 prompt tokens: {cold:.2f} s, with {warm_cached} of them cached {warm:.2f} s")
    assert cold_cached == 0
    assert warm_cached == 1000 // 64 * 64
    assert warm < cold / 3


def test_json_by_a_schema(server: EmbeddedServer) -> None:
    schema = {
        "type": "object",
        "properties": {"country": {"const": "France"}, "capital": {"type": "string", "maxLength": 20}},
        "required": ["country", "capital"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    messages = [{"role": "user", "content": "What is the capital of France? Answer in JSON."}]
    with TritonClient(server.address) as client:
        options = {"temperature": 0, "max_tokens": 100, "response_format": form}
        deltas = list(client.generate(messages=messages, options=options))
    answer = json.loads("".join(delta.text for delta in deltas))
    assert answer.keys() == {"country", "capital"} and "Paris" in answer["capital"]
    assert deltas[-1].finish_reason == "stop"
