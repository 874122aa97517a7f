"""Bytes as they leave: events of chat and text completions, lines of the interactive route, errors within them."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from tests.tools.api_server.scripted import MODEL, ScriptedBackend, app_of, words

from tritonmind.errors import NotFoundError, UnavailableError
from tritonmind.request_fields import SessionFields
from tritonmind_tools.console_transport import Delta


def post(backend: ScriptedBackend, path: str, body: Any, **settings: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app_of(backend, **settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    return asyncio.run(send())


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "a"}], **fields}


def fixed(text: str) -> str:
    """Without what differs from answer to answer."""
    return re.sub(r'"(chatcmpl|cmpl|call_)-?[0-9a-f]+"', r'"\1"', re.sub(r'"created":\d+', '"created":0', text))


def test_a_streamed_chat() -> None:
    backend = ScriptedBackend(lambda request: words("Hel", "lo é", "!"))
    answer = post(backend, "/v1/chat/completions", chat(stream=True, stream_options={"include_usage": True}))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    head = '{"id":"chatcmpl","object":"chat.completion.chunk","created":0,"model":"scripted","choices":['
    deltas = [
        '"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null',
        '"delta":{"content":"Hel"},"logprobs":null,"finish_reason":null',
        '"delta":{"content":"lo é"},"logprobs":null,"finish_reason":null',
        '"delta":{"content":"!"},"logprobs":null,"finish_reason":null',
        '"delta":{},"logprobs":null,"finish_reason":"stop"',
    ]
    usage = '"prompt_tokens":7,"completion_tokens":3,"total_tokens":10,"prompt_tokens_details":{"cached_tokens":2}'
    events = [f'data: {head}{{"index":0,{delta}}}],"usage":null}}\n\n' for delta in deltas]
    events += [f'data: {head}],"usage":{{{usage}}}}}\n\n', "data: [DONE]\n\n"]
    assert fixed(answer.text) == "".join(events)


def test_a_whole_chat() -> None:
    answer = post(
        ScriptedBackend(lambda request: words("Hi", "!", finish_reason="length")), "/v1/chat/completions", chat()
    )
    assert answer.headers["content-type"] == "application/json"
    assert fixed(answer.text) == (
        '{"id":"chatcmpl","object":"chat.completion","created":0,"model":"scripted","choices":[{"index":0,"message":'
        '{"role":"assistant","content":"Hi!","refusal":null},"logprobs":null,"finish_reason":"length"}],"usage":'
        '{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9,"prompt_tokens_details":{"cached_tokens":2}}}'
    )


def test_a_streamed_completion() -> None:
    backend = ScriptedBackend(lambda request: words("b", "c"))
    answer = post(backend, "/v1/completions", {"model": MODEL, "prompt": "a", "stream": True, "echo": True})
    head = 'data: {"id":"cmpl","object":"text_completion","created":0,"model":"scripted","choices":[{"index":0,"text":'
    assert fixed(answer.text) == (
        f'{head}"ab","logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{head}"c","logprobs":null,"finish_reason":"stop"}}]}}\n\n'
        "data: [DONE]\n\n"
    )
    assert backend.requests[0].params.max_tokens == 16


def test_the_tutorials_own_body() -> None:
    backend = ScriptedBackend(lambda request: words("ok"))
    body = {
        "model": MODEL,
        "messages": "写一首春天的诗",
        "temperature": 0.7,
        "top_p": 1,
        "n": 1,
        "max_tokens": 512,
        "stop": False,
        "stream": False,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "user": "string",
        "repetition_penalty": 1,
        "renew_session": False,
        "ignore_eos": False,
    }
    answer = post(backend, "/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    (request,) = backend.requests
    assert request.messages == [{"role": "user", "content": "写一首春天的诗"}]
    assert (request.params.max_tokens, request.params.temperature, request.params.stop) == (512, 0.7, ())


def test_several_prompts_and_answers_have_numbers_of_their_own() -> None:
    def script(request: Any) -> list[Any]:
        return [[Delta(index=i, text=f"{request.text}{i}", num_tokens=1, finish_reason="stop")] for i in range(2)]

    answer = post(ScriptedBackend(script), "/v1/completions", {"model": MODEL, "prompt": ["x", "y"], "n": 2})
    texts = {choice["index"]: choice["text"] for choice in answer.json()["choices"]}
    assert texts == {0: "x0", 1: "x1", 2: "y0", 3: "y1"}


def test_an_error_before_the_first_token_is_a_status_and_one_after_it_an_event() -> None:
    def script(request: Any) -> list[Any]:
        error = UnavailableError("the engine is down")
        return [error] if request.messages[0]["content"] == "first" else [*words("a", "b")[:1], error]

    for stream in (False, True):
        early = post(ScriptedBackend(script), "/v1/chat/completions", chat(messages="first", stream=stream))
        assert early.status_code == 503 and early.headers["retry-after"] == "1"
        assert early.json()["error"]["message"] == "the engine is down"
    late = post(ScriptedBackend(script), "/v1/chat/completions", chat(stream=True))
    assert late.status_code == 200
    last = late.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"


def test_interactive_lines_count_tokens_on() -> None:
    backend = ScriptedBackend(lambda request: words("a", "b", finish_reason="length"))
    body = {"prompt": "x", "session_id": 5, "interactive_mode": True, "stream": True}
    answer = post(backend, "/v1/chat/interactive", body)
    assert answer.text == (
        '{"text":"a","tokens":1,"finish_reason":null}\n{"text":"b","tokens":2,"finish_reason":"length"}\n'
    )
    assert answer.headers["x-session-id"] == "5"
    whole = post(backend, "/generate", {"prompt": [{"role": "user", "content": "x"}]})
    assert whole.json() == {"text": "ab", "tokens": 2, "finish_reason": "length"}
    assert int(whole.headers["x-session-id"]) >= 0
    first, second = backend.requests
    assert first.session == SessionFields(session_id=5) and first.params.max_tokens == 512
    assert second.session is not None and second.session.start and second.session.end


def test_interactive_begins_a_session_that_nobody_knows_and_says_when_one_was_lost() -> None:
    known: set[int] = set()

    def script(request: Any) -> list[Any]:
        if request.session.session_id not in known and not request.session.start:
            return [NotFoundError("session expired")]
        known.add(request.session.session_id)
        return words("ok")

    async def turns() -> list[int]:
        transport = httpx.ASGITransport(app_of(ScriptedBackend(script)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"prompt": "x", "session_id": 5, "interactive_mode": True}
            codes = [(await client.post("/generate", json=body)).status_code for _ in range(2)]
            known.clear()
            codes.append((await client.post("/generate", json=body)).status_code)
            return [*codes, (await client.post("/generate", json={**body, "renew_session": True})).status_code]

    assert asyncio.run(turns()) == [200, 200, 404, 200]


@pytest.mark.parametrize(
    ("body", "session"),
    [
        ({"prompt": "", "session_id": 3}, SessionFields(session_id=3, end=True)),
        ({"prompt": "", "session_id": 3, "stop": True}, SessionFields(session_id=3, stop=True)),
    ],
)
def test_interactive_orders(body: dict[str, Any], session: SessionFields) -> None:
    backend = ScriptedBackend(lambda request: words("", prompt=0, cached=0))
    answer = post(backend, "/v1/chat/interactive", body)
    assert answer.json() == {"text": "", "tokens": 0, "finish_reason": None}
    assert backend.requests[0].session == session and backend.requests[0].is_order
