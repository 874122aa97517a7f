"""The server over an engine with a tiny random model: anything its description allows, and many clients at once."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from tests.tools.api_server.scripted import app_of, running
from tests.workspaces import tiny_workspace

from tritonmind_tools.api_server.local_backend import LocalBackend

MODEL = "tiny"
BOS = "<|im_start|>"
NUM_CLIENTS = 200
NUM_TOKENS = 12
MAX_EXAMPLES = 12


class Served(NamedTuple):
    url: str
    backend: LocalBackend


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    workspace = tiny_workspace(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)
    # As Llama-2's: a text loses the space that it begins with.
    file = workspace / "triton_models" / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], strip]}
    file.write_text(json.dumps(content))
    options = {"num_threads": 1, "max_num_seqs": 64, "cache_max_entry_count": 1024, "device": "cpu"}
    backend = LocalBackend(str(workspace), options, name=MODEL)
    with running(app_of(backend)) as url:
        yield Served(url, backend)
    backend.close()


def test_no_answer_is_a_500(served: Served) -> None:
    """What the OpenAPI description allows, and what it does not, drawn by schemathesis for each route."""
    description = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    num_routes = 0
    for found in description.get_all_operations():
        operation = found.ok()
        num_routes += 1

        @settings(
            max_examples=MAX_EXAMPLES if operation.method == "post" else 1,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
            deadline=None,
            database=None,
        )
        @given(st.one_of(operation.as_strategy(mode) for mode in GenerationMode))
        def answers(case: Any) -> None:
            if isinstance(case.body, dict):
                if "model" in case.body:
                    case.body["model"] = MODEL
                for name in ("max_tokens", "max_completion_tokens", "request_output_len"):
                    if isinstance(case.body.get(name), int) and case.body[name] > NUM_TOKENS:
                        case.body[name] = NUM_TOKENS  # what is tried is not how long an answer may be
            case.call_and_validate(checks=[not_a_server_error], timeout=120)

        answers()
    assert num_routes >= 9


def test_200_clients_at_once_all_get_their_answers(served: Served) -> None:
    async def one(client: httpx.AsyncClient, number: int) -> tuple[str, str]:
        body = {
            "model": MODEL,
            "prompt": [3 + number % 200, 7, 9],
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, usage, last = "", {}, ""
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    usage = event["usage"] or usage
                    text += "".join(choice["text"] for choice in event["choices"])
        assert usage["completion_tokens"] == NUM_TOKENS
        return text, last

    async def everyone() -> list[tuple[str, str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, timeout=240, limits=limits) as client:
            return list(await asyncio.gather(*(one(client, number) for number in range(NUM_CLIENTS))))

    answers = asyncio.run(everyone())
    assert {last for _, last in answers} == {"data: [DONE]"}
    alone = httpx.post(
        f"{served.url}/v1/completions",
        json={"model": MODEL, "prompt": [8, 7, 9], "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True},
        timeout=60,
    )
    assert answers[5][0] == alone.json()["choices"][0]["text"]


def test_a_client_that_goes_frees_the_engine(served: Served) -> None:
    client = served.backend._server._engine.require()
    body = {"model": MODEL, "prompt": "a", "max_tokens": 400, "n": 32, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
        pieces = answer.iter_raw()  # kept: httpx closes the connection of an iterator that is dropped
        assert next(pieces).startswith(b"data: ")
        assert client.stats().num_running
    deadline = time.monotonic() + 10
    while client.stats().num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.stats().num_running == 0


def test_the_prompts_log_probabilities_and_text_come_back(served: Served) -> None:
    def ask(**fields: Any) -> dict[str, Any]:
        body = {"model": MODEL, "prompt": f"{BOS}hé b", "echo": True, "logprobs": 1, **fields}
        answer: dict[str, Any] = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()
        return answer

    alone = ask(max_tokens=0)
    (choice,) = alone["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == f"{BOS}hé b" and choice["finish_reason"] == "length"
    assert alone["usage"]["completion_tokens"] == 0
    number = alone["usage"]["prompt_tokens"]
    assert [len(values) for values in logprobs.values()] == [number] * 4
    assert logprobs["token_logprobs"][0] is None and logprobs["token_logprobs"][1] < 0
    assert len(logprobs["top_logprobs"][1]) in (1, 2)
    # A special token that is written out is in the text; both bytes of a letter are at its place.
    at = len(BOS)
    assert logprobs["tokens"][:2] == [BOS, "h"] and logprobs["text_offset"][:5] == [0, at, at + 1, at + 1, at + 2]
    # Each answer has the prompt, and its own tokens behind it.
    for each in ask(max_tokens=3, n=2, seed=1, ignore_eos=True)["choices"]:
        assert each["logprobs"]["tokens"][:number] == logprobs["tokens"]
        assert each["logprobs"]["text_offset"][:number] == logprobs["text_offset"]
        assert len(each["logprobs"]["tokens"]) == number + 3 and each["logprobs"]["text_offset"][number] == at + 4


def test_what_goes_on_from_a_text_keeps_its_first_space(served: Served) -> None:
    """Python's indentation depends on it. An answer to messages begins with a word, as Transformers decodes it."""
    tokenizer = served.backend.model.tokenizer
    assert tokenizer is not None
    (space,) = tokenizer.encode(" ", add_special_tokens=False)
    options = {"model": MODEL, "logit_bias": {space: 100}, "max_tokens": 2, "temperature": 0, "logprobs": 1}
    (choice,) = httpx.post(f"{served.url}/v1/completions", json={**options, "prompt": "a"}, timeout=60).json()[
        "choices"
    ]
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == "  "
    options = {**options, "logprobs": True, "messages": "a"}
    (choice,) = httpx.post(f"{served.url}/v1/chat/completions", json=options, timeout=60).json()["choices"]
    assert choice["message"]["content"] == " "


def test_metrics_count_what_was_done(served: Served) -> None:
    idle = 'tritonmind_kv_blocks{model="tiny",state="used"} 0\n'
    deadline = time.monotonic() + 30
    found, text = None, ""
    while (found is None or idle not in text) and time.monotonic() < deadline:
        text = httpx.get(f"{served.url}/metrics", timeout=60).text
        found = re.search(r'tritonmind_requests_finished_total\{model="tiny",reason="length"\} [1-9]', text)
    assert found and idle in text
    assert re.search(r'tritonmind_time_to_first_token_seconds_count\{model="tiny"\} [1-9]', text)
