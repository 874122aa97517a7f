"""Files of texts and conversations, and what a model sees of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tritonmind.chat_template import ChatTemplate
from tritonmind.errors import ConfigError
from tritonmind_tools.text_data import read_documents, render

QUESTION, ANSWER = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}


def test_sharegpt_conversations_alternate_and_a_cut_off_file_gives_what_is_whole(tmp_path: Path) -> None:
    entries = [
        {"id": "a", "conversations": [ANSWER, QUESTION, {"from": "human", "value": "Tell me."}, ANSWER]},
        {"id": "b", "conversations": [{"from": "tool", "value": "x"}, QUESTION]},
        {"id": "c", "conversations": []},
        {"id": "d", "conversations": [{"from": "system", "value": "Be brief."}, QUESTION, ANSWER], "score": 0.5},
        {"id": "e", "conversations": [QUESTION, ANSWER]},
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(entries)[:-20])
    assert list(read_documents(path)) == [
        [{"role": "user", "content": "Why?\n\nTell me."}, {"role": "assistant", "content": "Because."}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because."},
        ],
    ]


def test_lines_of_texts_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_text("\n".join(map(json.dumps, ["as it is", {"text": "t"}, {"content": " "}, {"messages": messages}])))
    documents = list(read_documents(path))
    assert documents == ["as it is", "t", messages]
    assert render(documents[0], None) == "as it is"
    assert render(documents[2], None) == "user: Hi\n\nassistant: Hello"
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", {}, where="test")
    assert render(documents[2], template) == "<user>Hi<assistant>Hello"

    path.write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(ConfigError, match=r"mixed.jsonl, line 2: no JSON"):
        list(read_documents(path))


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("A text.\n\nMore of it.\n")
    assert list(read_documents(path)) == ["A text.\n\nMore of it.\n"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"plain.txt is not UTF-8"):
        list(read_documents(path))
    with pytest.raises(ConfigError, match=r"none of .txt, .jsonl, .json"):
        (tmp_path / "x.parquet").write_bytes(b"")
        list(read_documents(tmp_path / "x.parquet"))
    with pytest.raises(ConfigError, match=r"missing.json is no file"):
        list(read_documents(tmp_path / "missing.json"))


def test_compressed_lines_in_a_json_are_read_as_c4_has_them(tmp_path: Path) -> None:
    path = tmp_path / "c4-train.00000-of-01024.json.gz"
    lines = "\n".join(json.dumps({"text": text, "url": "x"}) for text in ("One.", "Two."))
    path.write_bytes(gzip.compress(lines.encode()))
    assert list(read_documents(path)) == ["One.", "Two."]
    path.write_bytes(gzip.compress(lines.encode())[:-12])
    with pytest.raises(ConfigError, match=r"c4-train.00000-of-01024.json.gz cannot be unpacked"):
        list(read_documents(path))
