"""Chat templates: as Transformers renders them, sandboxed, with errors that name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tritonmind.chat_template import (
    TOOL_TEMPLATE_FILE,
    ChatTemplate,
    load_chat_template,
    parse_messages,
    parse_tools,
)
from tritonmind.errors import ConfigError, InvalidRequestError
from tritonmind.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe?\n"},
    {"role": "assistant", "content": " 1 < 2 & 'x' "},
    {"role": "user", "content": "你好"},
]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL, where="test")


def test_same_text_and_ids_as_transformers(smollm2_workspace: Path) -> None:
    from transformers import AutoTokenizer

    directory = smollm2_workspace / "triton_models" / "tokenizer"
    theirs = AutoTokenizer.from_pretrained(directory)
    tokenizer = Tokenizer.from_dir(directory)
    ours = load_chat_template(directory, tokenizer.special_tokens)
    assert ours is not None
    for messages in (CONVERSATION, CONVERSATION[1:2], CONVERSATION[1:]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            text = ours.render(messages, add_generation_prompt=prompt)
            assert text == expected
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert tokenizer.encode_prompt(text) == ids


def test_usual_globals_and_tags() -> None:
    assert template("{{ messages | tojson }}").render([{"role": "u", "content": "<é&'>"}]) == (
        '[{"role": "u", "content": "<é&\'>"}]'
    )
    assert template("{{ strftime_now('%Y')[:2] }}").render([]) == "20"
    assert template("{% for m in messages %}{% break %}{% endfor %}x").render(CONVERSATION) == "x"
    assert template("{% generation %}{{ bos_token }}{% endgeneration %}{{ eos_token }}").render([]) == "<s></s>"
    assert template("{% if tools is none and documents is none %}none{% endif %}").render([]) == "none"
    assert template("  {% if add_generation_prompt %}\n yes{% endif %}\n").render([]) == " yes"


def test_refusal_of_the_template_reaches_the_user() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render(CONVERSATION)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[9].content }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ open('/etc/passwd') }}",
    ],
)
def test_failing_or_forbidden_template_is_an_invalid_request(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="the chat template fails"):
        template(source).render(CONVERSATION)


def test_broken_template_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("\n{% for %}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: the chat template is broken at line 2"):
        load_chat_template(tmp_path, SPECIAL)


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    def rendered(*tools: dict[str, Any]) -> str | None:
        found = load_chat_template(tmp_path, SPECIAL)
        return None if found is None else found.render([], tools=tools)

    tool = {"type": "function", "function": {"name": "f"}}

    assert rendered() is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<s>"}))
    assert rendered() is None
    config.write_text(json.dumps({"chat_template": "one"}))
    assert rendered() == "one"
    with pytest.raises(InvalidRequestError, match="no place for tools"):
        rendered(tool)
    named = [{"name": "tool_use", "template": "{{ tools | length }}"}, {"name": "default", "template": "default"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert (rendered(), rendered(tool)) == ("default", "1")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered() == "file"
    (tmp_path / TOOL_TEMPLATE_FILE).parent.mkdir()
    (tmp_path / TOOL_TEMPLATE_FILE).write_text("{{ tools[0].function.name }}")
    assert (rendered(), rendered(tool)) == ("file", "f")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja cannot be read"):
        rendered()


def test_template_of_a_wrong_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 1}))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template"):
        load_chat_template(tmp_path, SPECIAL)


def test_messages_are_parsed() -> None:
    assert parse_messages(json.dumps(CONVERSATION)) == CONVERSATION


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "messages="),
        ("{}", "messages={}"),
        ("[]", r"messages=\[\]"),
        ("[1]", r"messages\[0\]=1"),
        ('[{"role": "user", "content": "a"}, {"content": "b"}]', r"messages\[1\]\.role=None"),
        ('[{"role": "user", "content": ["a"]}]', r"messages\[0\]\.content"),
        ('[{"role": "user", "content": "a", "weight": 1}]', r"messages\[0\]={'weight': 1}"),
        ('[{"role": "user", "content": "a", "name": 1}]', r"messages\[0\]\.name=1"),
        ('[{"role": "assistant", "content": "", "tool_calls": [1]}]', r"messages\[0\]\.tool_calls"),
        ('[{"role": "user", "content": "a", "\\n=": 1}]', r"messages\[0\]={'\\n=': 1}"),
        ('[{"role": "user", "content": "\\ud800"}]', "messages="),
    ],
)
def test_bad_messages_are_named(text: str, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        parse_messages(text)


@pytest.mark.parametrize("depth", [10, 300, 600, 900, 100_000])
def test_nesting_at_any_depth_is_an_invalid_request(depth: int) -> None:
    """Some depths can be decoded, but not shown in an error's message."""
    nested = "[" * depth + "]" * depth
    for text in ("[" * depth, nested, f'[{{"role": "user", "content": {nested}}}]'):
        with pytest.raises(InvalidRequestError, match="messages"):
            parse_messages(text)


def test_tools_and_variables_reach_the_template() -> None:
    source = "{{ tools | tojson }}{% if think %}T{% endif %}{{ messages[0].tool_calls[0].function.name }}"
    (message,) = parse_messages(
        '[{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]'
    )
    (tool,) = parse_tools('[{"type": "function", "function": {"name": "f"}}]')
    text = template(source).render([message], tools=[tool], variables={"think": True, "messages": "shadowed"})
    assert text == '[{"type": "function", "function": {"name": "f"}}]Tf'


def test_tools_without_a_place_for_them_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no place for tools"):
        template("{{ messages }}").render([{"role": "user", "content": "a"}], tools=[{"type": "function"}])


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"type": "function"}]', '[{"function": {"name": "f"}}]', "["])
def test_bad_tools_are_named(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="tools"):
        parse_tools(text)
