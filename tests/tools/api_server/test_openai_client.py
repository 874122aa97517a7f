"""The official openai client against SmolLM2, over an engine and over the real Triton server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.tools.api_server.conftest import SMOLLM2, TIMEOUT_S

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[3]

# What goes no other way over a Triton server than what both are tried with.
engine_only = pytest.mark.parametrize("url", ["engine"], indirect=True)
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (SMOLLM2, "model", "tritonmind")
    assert client.models.retrieve(SMOLLM2) == model
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("gpt")


def test_a_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    options: Any = {"model": SMOLLM2, "messages": FRANCE, "temperature": 0, "max_completion_tokens": 24}
    whole = client.chat.completions.create(**options)
    (choice,) = whole.choices
    assert choice.message.content is not None and "Paris" in choice.message.content
    assert choice.finish_reason == "stop" and whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    *chunks, last = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {last.id} and all(chunk.usage is None for chunk in chunks)
    assert not last.choices and last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    # The prompt was there before: its full blocks come from the prefix cache, where it has any.
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


@engine_only
def test_answers_of_one_request_and_seeds(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=SMOLLM2, messages=FRANCE, n=3, seed=seed, temperature=1.5, max_tokens=8
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = texts(-3)
    assert texts(-3) == first and len(set(first)) > 1


@engine_only
def test_stop_strings_and_biases(client: openai.OpenAI) -> None:
    options: Any = {"model": SMOLLM2, "messages": FRANCE, "temperature": 0, "max_tokens": 24}
    stopped = client.chat.completions.create(**options, stop=["Paris", "never"]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.message.content is not None
    assert stopped.message.content.endswith("France is ") and "Paris" not in stopped.message.content
    biased = client.chat.completions.create(**{**options, "max_tokens": 3}, logit_bias={"260": 100}).choices[0]
    assert biased.message.content == " the the the"


def test_log_probabilities(client: openai.OpenAI) -> None:
    options: Any = {"model": SMOLLM2, "messages": FRANCE, "temperature": 0, "max_tokens": 4}
    choice = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert token.bytes == list(token.token.encode()) and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token and token.top_logprobs[0].logprob == token.logprob <= 0
    chunks = client.chat.completions.create(**options, logprobs=True, top_logprobs=3, stream=True)
    streamed = [
        token for chunk in chunks for token in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or ()
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_a_text_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=SMOLLM2, prompt=["The capital of France is", "One, two, three,"], temperature=0, max_tokens=5, logprobs=2
    )
    first, second = answer.choices
    assert "Paris" in first.text and "four" in second.text and (first.index, second.index) == (0, 1)
    assert first.logprobs is not None and first.logprobs.tokens is not None
    assert "".join(first.logprobs.tokens) == first.text
    assert first.logprobs.text_offset is not None and first.logprobs.text_offset[0] == 0
    chunks = client.completions.create(
        model=SMOLLM2, prompt="The capital of France is", temperature=0, max_tokens=5, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == first.text
    ids = [504, 3575, 282, 4649, 314]
    answer = client.completions.create(model=SMOLLM2, prompt=ids, temperature=0, max_tokens=5)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="session_len is") as caught:
        client.chat.completions.create(model=SMOLLM2, messages=[{"role": "user", "content": "word " * 9000}])
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    assert "tokens" in str(caught.value)
    with pytest.raises(openai.NotFoundError, match="gpt"):
        client.chat.completions.create(model="gpt", messages=FRANCE)
    with pytest.raises(openai.BadRequestError, match="logit_bias") as caught:
        client.chat.completions.create(model=SMOLLM2, messages=FRANCE, logit_bias={"999999": 1})
    assert caught.value.param == "logit_bias"


def test_a_session_is_remembered_and_takes_one_request_at_a_time(client: openai.OpenAI, url: str) -> None:
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:

        def ask(**fields: Any) -> httpx.Response:
            body = {"session_id": 77, "interactive_mode": True, "temperature": 0, "request_output_len": 16, **fields}
            return http.post("/v1/chat/interactive", json=body)

        said = ask(prompt="Name a river.").json()["text"]
        more = ask(prompt="And where is it?").json()["text"]
        conversation: Any = [
            {"role": "user", "content": "Name a river."},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "And where is it?"},
        ]
        options: Any = {"model": SMOLLM2, "temperature": 0, "max_tokens": 16}
        assert client.chat.completions.create(messages=conversation, **options).choices[0].message.content == more
        body = {"prompt": "Count to 1000.", "session_id": 77, "interactive_mode": True, "stream": True}
        with http.stream("POST", "/generate", json={**body, "request_output_len": 500, "ignore_eos": True}) as turn:
            lines = turn.iter_lines()
            assert json.loads(next(lines))["finish_reason"] is None
            busy = ask(prompt="And I?")
            assert busy.status_code == 409 and "77" in busy.json()["error"]["message"]
            assert ask(prompt="", stop=True).json() == {"text": "", "tokens": 0, "finish_reason": None}
            rest = [json.loads(line) for line in lines]
        assert rest[-1]["tokens"] < 500
        assert ask(prompt="", interactive_mode=False).json()["tokens"] == 0
        # The session is gone: the same id is a new one.
        assert ask(prompt="Name a river.").json()["text"] == said
        assert ask(prompt="Name a river.", renew_session=True).json()["text"] == said


@engine_only
def test_a_stream_that_is_left_is_given_up(client: openai.OpenAI) -> None:
    """What holds the machine for a minute would hold the next answer up."""
    options: Any = {"model": SMOLLM2, "messages": FRANCE, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    for _ in range(3):
        with client.chat.completions.create(**options, stream=True) as stream:
            next(iter(stream))
    answer = client.with_options(timeout=60).chat.completions.create(model=SMOLLM2, messages=FRANCE, max_tokens=2)
    assert answer.choices[0].message.content


PERSON: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_an_answer_is_held_to_a_schema(client: openai.OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    messages: Any = [{"role": "user", "content": "Make up a person."}]
    chunks = client.chat.completions.create(
        model=SMOLLM2, messages=messages, response_format=schema, max_tokens=40, seed=1, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    person = json.loads(text)
    assert person.keys() == {"name", "age"} and 0 <= person["age"] <= 150 and len(person["name"]) <= 10


@engine_only
def test_an_answer_is_held_to_an_expression_and_impossible_ones_are_refused(client: openai.OpenAI) -> None:
    def ask(**form: Any) -> str | None:
        options: Any = {"model": SMOLLM2, "messages": FRANCE, "max_tokens": 20}
        return (
            client.chat.completions.create(**options, extra_body={"response_format": form}).choices[0].message.content
        )

    text = ask(type="regex", regex="[0-9]{3}-[ab]+c")
    assert text is not None and re.fullmatch("[0-9]{3}-[ab]+c?", text)
    impossible = {"type": "object", "properties": {"a": {"type": "nothing"}}, "required": ["a"]}
    for form in (
        {"type": "regex", "regex": "(["},
        {"type": "regex", "regex": "((a{0,99999}){0,99999}){0,99999}"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": impossible}},
    ):
        with pytest.raises(openai.BadRequestError, match="response_format") as caught:
            ask(**form)
        assert caught.value.param == "response_format"


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"City": {"enum": ["Oslo", "Rome"]}},
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_come(client: openai.OpenAI, stream: bool) -> None:
    options: Any = {"model": SMOLLM2, "messages": [{"role": "user", "content": "What is the weather in Rome?"}]}
    options |= {"tools": [WEATHER], "max_tokens": 60, "temperature": 0}
    if stream:
        with client.chat.completions.stream(**options, tool_choice="required") as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**options, tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


@engine_only
def test_what_the_documentation_shows_works(url: str) -> None:
    """Each request in bash that it has, and its program."""
    text = (ROOT / "docs" / "api_server.md").read_text().replace("http://127.0.0.1:23333", url)
    requests = [block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if block.startswith("curl")]
    assert len(requests) == 3
    for command in requests:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0 and '"error"' not in done.stdout, done
        assert '"choices"' in done.stdout or '"tokens"' in done.stdout
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.rindex("{") :]).keys() == {"river"}


def test_token_ids_of_texts(url: str, request: pytest.FixtureRequest) -> None:
    answer = httpx.post(f"{url}/v1/encode", json={"input": ["The capital", "a"]}, timeout=TIMEOUT_S)
    if answer.status_code == 400:
        assert "Triton" in answer.json()["error"]["message"]
    else:
        assert answer.json()["length"] == [2, 1] and len(answer.json()["input_ids"][0]) == 2
