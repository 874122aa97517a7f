"""Texts and conversations out of local files: what calibrates a model, and what its accuracy is measured on.

A document is a text as it stands, or a conversation that a chat template renders. Files are read as a stream: a
ShareGPT file of hundreds of megabytes takes no more memory than its longest conversation.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from tritonmind.errors import ConfigError

if TYPE_CHECKING:
    from tritonmind.chat_template import ChatTemplate, Message
    from tritonmind.tokenizer import Tokenizer

Document: TypeAlias = "str | list[Message]"

FORMATS = (".txt", ".jsonl", ".json")
_COMPRESSED = ".gz"
_PEEKED_BYTES = 64
# Under these keys the lines of a .jsonl, or the entries of a .json, have their text or their turns.
TEXT_KEYS = ("text", "content")
TURN_KEYS = ("conversations", "messages")
# Who speaks, as ShareGPT's files and OpenAI's format name it, in the words of chat templates.
ROLES = {
    "human": "user", "user": "user", "system": "system", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file in its order; entries without any text or with unknown roles are passed over.

    A .txt is one text. A .jsonl has an entry a line, a .json an array of entries or an entry a line as well: a text,
    an object with one under `text` or `content`, or a conversation under `conversations` (ShareGPT) or `messages`. A
    .json that is cut off is read as far as it is whole. Any of them may be compressed, .jsonl.gz. Raises ConfigError
    naming the file, and the line of a .jsonl, that is wrong.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is no file: give a {', '.join(FORMATS)}")
    kind = _plain_suffix(path)
    if kind not in FORMATS:
        raise ConfigError(f"{path} is none of {', '.join(FORMATS)}: a text, a JSON entry a line, ShareGPT's JSON")
    try:
        if kind == ".txt":
            with _open(path) as file:
                yield _decoded(path, file.read())
            return
        for entry in read_entries(path) if kind == ".json" and not _has_lines(path) else _read_lines(path):
            document = as_document(entry)
            if document:
                yield document
    except (EOFError, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} cannot be unpacked: {error}") from None


def read_entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON file's array, one by one; of a file that is cut off, those that are whole.

    Raises ConfigError for a file without an array, and for one that is cut off where ijson is not installed.
    """
    try:
        import ijson
    except ImportError:
        try:
            with _open(path) as file:
                entries = json.loads(file.read())
        except ValueError as error:
            raise ConfigError(
                f"{path} is no whole JSON ({error}); with pip install ijson what is whole of it can be read"
            ) from None
        if not isinstance(entries, list):
            raise ConfigError(f"{path} holds no JSON array of conversations") from None
        yield from entries
        return
    with _open(path) as file:
        try:
            # As floats, not as decimals, like the json module: nothing here computes with them.
            yield from ijson.items(file, "item", use_float=True)
        except ijson.JSONError:
            print(f"{path} is cut off or damaged: what is whole before that is taken", file=sys.stderr)


def as_document(entry: Any) -> Document | None:
    """The text or conversation of an entry, None for one that has none.

    A conversation begins with a system's or a user's turn and alternates, as chat templates want it: answers to
    nothing are left out at its beginning, and turns of one role in a row are joined.
    """
    if isinstance(entry, str):
        return (entry.strip() and entry) or None
    if not isinstance(entry, dict):
        return None
    for key in TURN_KEYS:
        if isinstance(entry.get(key), list):
            return _conversation(entry[key])
    texts = [entry[key] for key in TEXT_KEYS if isinstance(entry.get(key), str) and entry[key].strip()]
    return texts[0] if texts else None


def render(document: Document, template: ChatTemplate | None) -> str:
    """The text that a model sees of it; without a template, turns as paragraphs that begin with `role: `.

    Raises InvalidRequestError where the template refuses a conversation.
    """
    if isinstance(document, str):
        return document
    if template is None:
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in document)
    return template.render(document, add_generation_prompt=False)


def encode(document: Document, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """Token ids of a document, with the special tokens that a model expects at the beginning of a prompt."""
    text = render(document, template)
    if isinstance(document, str) or template is None:
        return tokenizer.encode_prompt(text)
    return tokenizer.encode(text, add_special_tokens=False)


def _conversation(turns: Sequence[Any]) -> list[Message] | None:
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role not in ROLES or not isinstance(text, str):
            return None
        role = ROLES[role]
        if not text.strip() or (role == "assistant" and not any(message["role"] == "user" for message in messages)):
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1] = {"role": role, "content": f"{messages[-1]['content']}\n\n{text}"}
        else:
            messages.append({"role": role, "content": text})
    return messages or None


def _plain_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == _COMPRESSED else path.suffix


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == _COMPRESSED else path.open("rb")


def _has_lines(path: Path) -> bool:
    """Whether a .json holds an object a line, as C4's files do, and no array."""
    with _open(path) as file:
        return file.read(_PEEKED_BYTES).lstrip().startswith(b"{")


def _read_lines(path: Path) -> Iterator[Any]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: no JSON ({error})") from None


def _decoded(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None
    if not text.strip():
        raise ConfigError(f"{path} holds no text")
    return text
