"""Calls and thoughts within a text, however it is cut into pieces; and chats that have them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.tools.api_server.scripted import ScriptedBackend, words
from tests.tools.api_server.test_wire import chat, post

from tritonmind_tools.api_server.dialect import find_dialect
from tritonmind_tools.api_server.tool_calls import FORCED, FORMATS, Format, Part, ReasoningParser, ToolCallParser

HERMES_TEMPLATE = "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{{ messages[-1].content }}"
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "time")
]


def taken_apart(form: Format, text: str, size: int, max_calls: int | None = None) -> tuple[str, list[list[str]]]:
    """Content, and the name and arguments of each call, of a text that comes in pieces of `size`."""
    parser = ToolCallParser(form, {"f", "g"}, max_calls=max_calls)
    parts = [part for at in range(0, len(text), size) for part in parser.push(text[at : at + size])] + parser.finish()
    calls: list[list[str]] = []
    for part in parts:
        if part.kind == "call":
            assert part.call == len(calls)
            calls.append([part.text, ""])
        elif part.kind == "arguments":
            calls[part.call][1] += part.text
    return "".join(part.text for part in parts if part.kind == "content"), calls


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (
            "hermes",
            'Hi <tool_call>\n{"name": "f", "arguments": {"a": "}\\"{<", "b": [1, {"c": 2}]}}\n</tool_call>\n'
            '<tool_call>{"arguments": {"q": 1}, "name": "g"}</tool_call>\n',
            "Hi ",
            [["f", '{"a": "}\\"{<", "b": [1, {"c": 2}]}'], ["g", '{"q": 1}']],
        ),
        ("hermes", '<tool_call>{"name": "f"}</tool_call> done', " done", [["f", "{}"]]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut', "", [["f", '{"a": "cut']]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [["f", '{"a": 1}']]),
        ("hermes", '<tool_call>{"name": "h", "arguments": {}}', '<tool_call>{"name": "h", "arguments": {}}', []),
        ("hermes", "<tool_call>no JSON</tool_call> a", "<tool_call>no JSON</tool_call> a", []),
        ("hermes", "a < b <tool", "a < b <tool", []),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [["f", '{"a": 1}']]),
        ("llama3", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [["f", "{}"], ["g", "{}"]]),
        ("llama3", '\n{"x": 1} is JSON', '\n{"x": 1} is JSON', []),
        ("llama3", "Use {braces}", "Use {braces}", []),
        (
            "internlm2",
            'Wait.<|action_start|><|plugin|>\n{"name": "g", "parameters": {"a": "ü"}}<|action_end|>\n',
            "Wait.",
            [["g", '{"a": "ü"}']],
        ),
    ],
)
def test_calls_are_found_however_the_text_comes(form: str, text: str, content: str, calls: list[list[str]]) -> None:
    for size in (1, 2, 3, 7, len(text)):
        assert taken_apart(FORMATS[form], text, size) == (content, calls), size


def test_calls_beyond_the_largest_number_are_left_out() -> None:
    text = "".join(f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in "fg")
    assert taken_apart(FORMATS["hermes"], text, 5, max_calls=1) == ("", [["f", "{}"]])
    assert taken_apart(FORCED, '{"name": "f", "arguments": {"a": 1}}', 5, max_calls=1) == ("", [["f", '{"a": 1}']])


@pytest.mark.parametrize(
    ("inside", "text", "thoughts", "content"),
    [
        (False, "<think>\nhm, ok\n</think>\n\nYes", "hm, ok", "Yes"),
        (True, "hm</think>Yes </think>", "hm", "Yes </think>"),
        (False, "No <think>", "", "No <think>"),
        (True, "never ends </thi", "never ends </thi", ""),
        (False, "<thi", "", "<thi"),
        (False, "<think>\n\n</think>\n\nA", "", "A"),
    ],
)
def test_thoughts_are_divided_from_what_is_said(inside: bool, text: str, thoughts: str, content: str) -> None:
    for size in (1, 2, 5, len(text)):
        parser = ReasoningParser(inside=inside)
        parts = [part for at in range(0, len(text), size) for part in parser.push(text[at : at + size])]
        parts += parser.finish()
        said = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content")}
        assert said == {"reasoning": thoughts, "content": content}, size


def test_what_is_no_call_is_not_held_back() -> None:
    parser = ToolCallParser(FORMATS["hermes"], {"f"})
    assert parser.push("a <") == [Part("content", "a ")]
    assert parser.push("b") == [Part("content", "<b")]


def test_the_template_says_how_calls_are_written() -> None:
    def parser(source: str) -> str | None:
        return find_dialect(
            ScriptedBackend(lambda r: [], template=source).model.chat_template, "auto", "auto"
        ).tool_parser

    assert parser("{{ tools }}<tool_call>") == "hermes"
    assert parser("{{ tools }}<|start_header_id|>ipython<|end_header_id|>") == "llama3"
    assert parser("{{ tools }}<|plugin|>") == "internlm2"
    assert parser("<tool_call>") is None


def streamed(text: str) -> tuple[str, list[dict[str, Any]], str]:
    """Content, calls put together as clients do it, and the finish reason."""
    content, calls, reason = "", [], ""
    for line in text.splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            content += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    calls.append(call)
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return content, calls, reason


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_with_calls(stream: bool) -> None:
    text = 'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    pieces = [text[at : at + 6] for at in range(0, len(text), 6)]
    backend = ScriptedBackend(lambda request: words(*pieces), template=HERMES_TEMPLATE)
    answer = post(backend, "/v1/chat/completions", chat(tools=TOOLS, stream=stream))
    if stream:
        content, calls, reason = streamed(answer.text)
    else:
        (choice,) = answer.json()["choices"]
        content, calls, reason = choice["message"]["content"], choice["message"]["tool_calls"], choice["finish_reason"]
    assert content == "Let me see. " and reason == "tool_calls"
    (call,) = calls
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert backend.requests[0].tools == TOOLS


def test_tool_choice_none_shows_the_model_no_tools() -> None:
    backend = ScriptedBackend(lambda request: words("<tool_call>"), template=HERMES_TEMPLATE)
    answer = post(backend, "/v1/chat/completions", chat(tools=TOOLS, tool_choice="none"))
    assert answer.json()["choices"][0]["message"]["content"] == "<tool_call>"
    assert backend.requests[0].tools is None


def test_allowed_tools_are_the_only_ones() -> None:
    backend = ScriptedBackend(lambda request: words("ok"), template=HERMES_TEMPLATE)
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    assert post(backend, "/v1/chat/completions", chat(tools=TOOLS, tool_choice=choice)).status_code == 200
    assert backend.requests[0].tools == TOOLS[1:]


def test_a_forced_call_is_held_to_its_parameters_and_their_references() -> None:
    backend = ScriptedBackend(lambda request: words("ok"), template=HERMES_TEMPLATE)
    deep: dict[str, Any] = {}
    for _ in range(600):
        deep = {"items": deep}
    for parameters, status in (
        ({"properties": {"a": {"$ref": "#/definitions/A"}, "b": {"$ref": "#"}}}, 200),
        (deep, 400),
    ):
        tools = [*TOOLS, {"type": "function", "function": {"name": "third", "parameters": parameters}}]
        answer = post(backend, "/v1/chat/completions", chat(tools=tools, tool_choice="required"))
        assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == "tools" and "deeply" in answer.json()["error"]["message"]
    form = backend.requests[0].params.guided
    assert form is not None
    third = json.loads(form.spec)["anyOf"][2]["properties"]
    place = "#/anyOf/2/properties/arguments"
    assert third["name"] == {"const": "third"} and third["arguments"] == {
        "type": "object",
        "properties": {"a": {"$ref": f"{place}/definitions/A"}, "b": {"$ref": place}},
    }


def test_special_marks_of_calls_are_kept_in_the_text() -> None:
    backend = ScriptedBackend(lambda request: words("ok"), template="{{ tools }}<|start_header_id|>ipython")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": []}]
    assert post(backend, "/v1/chat/completions", chat(tools=TOOLS, messages=messages)).status_code == 200
    assert not backend.requests[0].params.skip_special_tokens
    assert backend.requests[0].messages == [messages[0], {"role": "assistant", "content": "b"}]


def test_a_model_without_a_template_for_tools_is_told_of_them() -> None:
    backend = ScriptedBackend(lambda request: words("ok"), template="{{ messages[-1].content }}")
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "rain"}]},
    ]
    answer = post(backend, "/v1/chat/completions", chat(messages=messages, tools=TOOLS), tool_parser="prompt")
    assert answer.status_code == 200, answer.text
    (request,) = backend.requests
    assert request.tools is None and request.messages is not None
    system, _, call, result = request.messages
    assert (
        system["role"] == "system"
        and system["content"].startswith("Be brief.\n\n")
        and '"weather"' in system["content"]
    )
    assert call["content"] == '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert result == {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_of_a_chat(stream: bool) -> None:
    template = "{{ messages[-1].content }}{% if enable_thinking is not defined %}<think>{% else %}</think>{% endif %}"
    backend = ScriptedBackend(lambda request: words("Hm", "m</think>", "\n\nYes"), template=template)
    answer = post(backend, "/v1/chat/completions", chat(stream=stream))
    if stream:
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in answer.text.splitlines() if "{" in line]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hmm"
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes"
    else:
        message = answer.json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hmm", "Yes")
    post(backend, "/v1/chat/completions", chat(reasoning_effort="none"))
    assert backend.requests[1].template_variables == {"enable_thinking": False}
