"""/v1/responses by the official client: items, events, calls, thoughts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from tests.tools.api_server.scripted import MODEL, ScriptedBackend, app_of, running, words

from tritonmind.errors import UnavailableError

TEMPLATE = "{% if tools %}<tool_call>{{ tools }}{% endif %}{{ messages }}<think>{# </think> #}"
TOOL: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": None}
ANSWER = (
    "Hm",
    "m</think>\n",
    "It is ",
    "fine.",
    '<tool_call>{"name": "weather", "argu',
    'ments": {"a": 1}}</tool_call>',
)


@contextmanager
def client_of(script: Callable[[Any], list[Any]]) -> Iterator[tuple[openai.OpenAI, ScriptedBackend]]:
    backend = ScriptedBackend(script, template=TEMPLATE)
    with (
        running(app_of(backend)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client, backend


def test_a_response_and_its_events_build_the_same() -> None:
    with client_of(lambda request: words(*ANSWER)) as (client, backend):
        options: Any = {"model": MODEL, "input": "Weather?", "instructions": "Be brief.", "tools": [TOOL]}
        whole = client.responses.create(**options)
        events = list(client.responses.create(**options, stream=True))
    thought, message, call = whole.output
    assert thought.type == "reasoning" and thought.content is not None and thought.content[0].text == "Hmm"
    assert message.type == "message" and whole.output_text == "It is fine."
    assert call.type == "function_call" and (call.name, call.arguments) == ("weather", '{"a": 1}')
    assert whole.status == "completed" and whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (7, 6)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    last = events[-1]
    assert last.type == "response.completed"
    streamed = [item.model_dump(exclude={"id", "call_id"}) for item in last.response.output]
    assert streamed == [item.model_dump(exclude={"id", "call_id"}) for item in whole.output]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert (text, arguments) == ("It is fine.", '{"a": 1}')
    assert backend.requests[0].messages is not None
    assert [message["role"] for message in backend.requests[0].messages] == ["system", "user"]


def test_what_came_back_goes_on() -> None:
    with client_of(lambda request: words(*ANSWER)) as (client, backend):
        first = client.responses.create(model=MODEL, input="Weather?", tools=[TOOL])
        call = first.output[-1]
        assert call.type == "function_call"
        items: Any = [{"role": "user", "content": "Weather?"}, *first.output]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
        client.responses.create(model=MODEL, input=items, tools=[TOOL])
    messages = backend.requests[1].messages
    assert messages is not None
    user, assistant, tool = messages
    assert user["role"] == "user" and assistant["content"] == "It is fine."
    assert assistant["reasoning_content"] == "Hmm"
    assert assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"a": 1}}
    assert tool == {"role": "tool", "tool_call_id": call.call_id, "content": "rain"}


def test_one_that_is_cut_off_and_one_that_fails() -> None:
    with client_of(lambda request: words("</think>a", "b", finish_reason="length")) as (client, _):
        cut = client.responses.create(model=MODEL, input="x", max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    with client_of(lambda request: [words("a", "b")[0], UnavailableError("gone")]) as (client, _):
        *_, last = client.responses.create(model=MODEL, input="x", stream=True)
    assert last.type == "response.failed" and last.response.error is not None and "gone" in last.response.error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "a", "weight": 1}]}, "input[0]"),
        ({"reasoning": {"effort": "boundless"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str) -> None:
    with (
        client_of(lambda request: words("ok")) as (client, _),
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.responses.create(model=MODEL, **{"input": "x"}, extra_body=fields)
    assert caught.value.param == param
