"""Requests that are wrong: the status, and an error object that names the field."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from tests.tools.api_server.scripted import MODEL, ScriptedBackend, app_of, words

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def send(path: str, *, method: str = "POST", **request: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app_of(ScriptedBackend(lambda request: words("ok"))))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(run())


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a", **fields}]}


# What is sent beside the model, and the field that the error must name.
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": ""}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [1] * 20_000}, "messages"),
    (message(role="wizard"), "messages[0].role"),
    (message(role="function"), "messages[0].role"),
    (message(content=None), "messages[0].content"),
    (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0]"),
    (message(content="\ud800"), "messages[0].content"),
    (message(weight=1), "messages[0]"),
    (message(role="tool"), "messages[0].tool_call_id"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
    (message() | {"temperature": float("nan")}, "temperature"),
    (message() | {"top_p": float("inf")}, "top_p"),
    (message() | {"temperature": "1"}, "temperature"),
    (message() | {"temperature": -1}, "temperature"),
    (message() | {"n": 0}, "n"),
    (message() | {"n": 10**400}, "n"),
    (message() | {"n": True}, "n"),
    (message() | {"max_tokens": 0}, "max_tokens"),
    (message() | {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    (message() | {"seed": 2**64}, "seed"),
    (message() | {"stop": ["a"] * 65}, "stop"),
    (message() | {"stop": [""]}, "stop"),
    (message() | {"stop": ["a" * 2000]}, "stop"),
    (message() | {"stop": True}, "stop"),
    (message() | {"stop": 3}, "stop"),
    (message() | {"logit_bias": {"a": 1}}, "logit_bias"),
    (message() | {"logit_bias": {"1": 101}}, "logit_bias"),
    (message() | {"logit_bias": {"1": float("nan")}}, "logit_bias"),
    (message() | {"top_logprobs": 2}, "top_logprobs"),
    (message() | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (message() | {"stream_options": {"include_usage": True}}, "stream_options"),
    (message() | {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    (message() | {"tools": [{"type": "web_search"}]}, "tools[0].type"),
    (message() | {"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    (message() | {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    (message() | {"tools": [TOOL]}, "tools"),  # this model's way to call them is not known
    (message() | {"tool_choice": "required"}, "tool_choice"),
    (message() | {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    (message() | {"response_format": {"type": "xml"}}, "response_format"),
    (message() | {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    (message() | {"response_format": {"type": "regex", "regex": 1}}, "response_format"),
    (
        message() | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"minimum": float("nan")}}}},
        "response_format",
    ),
    (message() | {"response_format": {"type": "regex", "regex": "\ud800"}}, "response_format"),
    (
        message() | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": float("inf")}}}]},
        "tools",
    ),
    (message() | {"reasoning_effort": "low"}, "reasoning_effort"),
    (message() | {"user": "\ud800"}, "user"),
    (message() | {"audio": {"voice": "x"}}, "audio"),
    (message() | {"functions": []}, "functions"),
    (message() | {"store": True}, "store"),
    (message() | {"modalities": ["audio"]}, "modalities"),
    (message() | {"web_search_options": {}}, "web_search_options"),
    (message() | {"min_p": 2}, "min_p"),
    (message() | {"repetition_penalty": 0}, "repetition_penalty"),
    (message() | {"chat_template_kwargs": []}, "chat_template_kwargs"),
    (message() | {"unheard_of": 1}, "unheard_of"),
    ({}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS, ids=[f"{i}-{param}" for i, (_, param) in enumerate(BAD_CHATS)])
def test_a_bad_chat_is_a_400_that_names_its_field(fields: dict[str, Any], param: str) -> None:
    answer = send(CHAT, content=json.dumps({"model": MODEL, **fields}), headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["code"], error
    assert param.split("[")[0].split(".")[0] in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": 1, "echo": True}, "echo"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_bad_completion_is_a_400_that_names_its_field(fields: dict[str, Any], param: str) -> None:
    answer = send("/v1/completions", json={"model": MODEL, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "session_id": -2},
        {"prompt": "", "interactive_mode": True, "session_id": 1},
        {"prompt": ""},
        {"prompt": "a", "stop": True},
        {"prompt": "a", "request_output_len": -1},
        {"prompt": "a", "request_output_len": 0},
        {"prompt": "a", "sequence_start": True},
        {},
    ],
)
def test_a_bad_interactive_request_is_a_400(fields: dict[str, Any]) -> None:
    answer = send("/v1/chat/interactive", json=fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"], answer.text


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"a"', b"\xff", b'{"model": "\xff"}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b"null"],
    ids=["empty", "cut", "list", "text", "byte", "utf8", "deep", "digits", "null"],
)
def test_what_is_no_json_object_is_a_400(content: bytes) -> None:
    answer = send(CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_form_is_told_what_to_send() -> None:
    answer = send(CHAT, data={"model": MODEL})
    assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


def test_unknown_models_and_routes() -> None:
    answer = send(CHAT, json={"model": "gpt", "messages": "a"})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "model: 'gpt' is not served here, 'scripted' is",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert send("/v1/models/gpt", method="GET").status_code == 404
    assert send("/v1/nowhere", method="GET", headers={"host": "["}).json()["error"]["type"] == "invalid_request_error"
    assert send(CHAT, method="GET").status_code == 405
    assert (
        send("/v1/embeddings", json={"model": MODEL, "input": "a"}).json()["error"]["code"] == "unsupported_operation"
    )
    assert send("/v1/encode", json={"input": "a"}).status_code == 400
    assert "at most" in send("/v1/encode", json={"input": ["aé" * 2**20] * 2}).json()["error"]["message"]
