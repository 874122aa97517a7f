"""What a tokenizer needs of a vocabulary, and the small JSON files that checkpoints keep beside every kind of one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tritonmind.errors import ConfigError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
_FURTHER_SPECIAL_TOKENS = "additional_special_tokens"


@dataclass(frozen=True)
class Decoding:
    """How the bytes of tokens join to a text.

    strip: how many leading `strip_character`s the finished text loses, unless it begins with one of `unstripped_ids`.
    separator: between tokens.
    """

    strip: int = 0
    strip_character: str = " "
    unstripped_ids: frozenset[int] = frozenset()
    separator: str = ""


class Vocabulary(Protocol):
    """A vocabulary that was read. Immutable, shared by all threads."""

    @property
    def decoding(self) -> Decoding: ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids whose tokens say something to the model and nothing to a reader."""
        ...

    def ids(self) -> Iterable[int]:
        """Every id that has a token."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a whole text; special tokens written out in it are recognised either way."""
        ...

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that has some before it: without bos, without the space that some formats put first."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, special ones included."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of UTF-8, perhaps part of a character, that a token adds to the text; empty for an unknown id."""
        ...


class AddedToken(NamedTuple):
    """A token beside those of the vocabulary's own file. lstrip, rstrip: it takes the white space before, after it."""

    token_id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} when there is no such file. Raises ConfigError naming a file that is not one."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def read_special_tokens(directory: Path) -> dict[str, str]:
    """Names such as "bos_token" to their text; tokenizer_config.json comes before special_tokens_map.json."""
    special_tokens: dict[str, str] = {}
    for name in (SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE):
        for key, value in read_json_object(directory / name).items():
            text = _text_of(value)
            if key.endswith("_token") and text is not None:
                special_tokens[key] = text
    return special_tokens


def read_added_tokens(
    directory: Path, special_tokens: Iterable[str], token_id: Callable[[str], int | None]
) -> dict[str, AddedToken]:
    """The added tokens of a checkpoint by their text.

    They are in added_tokens.json, in the added_tokens_decoder of tokenizer_config.json, or named as special in either
    of the two files that do so, and then perhaps known to the vocabulary itself, which `token_id` asks.
    """
    file = directory / ADDED_TOKENS_FILE
    added = {
        text: AddedToken(_id(number, text, file), special=False) for text, number in read_json_object(file).items()
    }
    file = directory / TOKENIZER_CONFIG_FILE
    entries = read_json_object(file).get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise ConfigError(f"{file}: added_tokens_decoder must be an object of token ids")
    for number, entry in entries.items():
        text = _text_of(entry)
        if text is None or not number.isdecimal():
            raise ConfigError(f"{file}: added_tokens_decoder has {number!r}: {entry!r}, not a token id and its token")
        flags = entry if isinstance(entry, dict) else {}
        added[text] = AddedToken(
            int(number),
            special=bool(flags.get("special")),
            lstrip=bool(flags.get("lstrip")),
            rstrip=bool(flags.get("rstrip")),
        )
    further = [
        text
        for name in (SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE)
        for value in read_json_object(directory / name).get(_FURTHER_SPECIAL_TOKENS) or ()
        if (text := _text_of(value)) is not None
    ]
    for text in (*special_tokens, *further):
        known = added.get(text)
        number = known.token_id if known else token_id(text)
        if number is not None:
            added[text] = (known or AddedToken(number, special=True))._replace(special=True)
    return added


class AddedTokenSplitter:
    """Cuts a text at the added tokens that are written out in it, the longest of those that begin at a place."""

    def __init__(self, added: Mapping[str, AddedToken]) -> None:
        self._added = added
        texts = sorted((text for text in added if text), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def split(self, text: str) -> Iterator[str | int]:
        """The pieces of `text`, none of them empty: texts, and the ids of added tokens."""
        position, strip_next = 0, False
        for match in self._pattern.finditer(text) if self._pattern else ():
            token = self._added[match[0]]
            yield from _stripped(text[position : match.start()], left=strip_next, right=token.lstrip)
            yield token.token_id
            position, strip_next = match.end(), token.rstrip
        yield from _stripped(text[position:], left=strip_next, right=False)


def _stripped(text: str, *, left: bool, right: bool) -> Iterator[str]:
    text = text.lstrip() if left else text
    text = text.rstrip() if right else text
    if text:
        yield text


def _text_of(value: Any) -> str | None:
    """A token's text, which stands by itself or in an object with its flags."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _id(number: Any, text: str, file: Path) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ConfigError(f"{file}: {text!r} has {number!r}, which is no token id")
    return number
