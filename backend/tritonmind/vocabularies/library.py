"""tokenizer.json, the format of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from tritonmind.errors import ConfigError
from tritonmind.vocabularies.base import Decoding, read_json_object

TOKENIZER_FILE = "tokenizer.json"
# Stands for the text before a continuation: ends a line in every vocabulary, grows together with no text after it.
_ANCHOR = "\n"


def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte of GPT-2's byte-level BPE: printable bytes are themselves, the rest sit from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True)
class _TokenRule:
    """What tokenizer.json's `decoder` does to one token.

    replacements: applied to its text in order. byte_fallback: tokens <0x00> to <0xFF> are bytes.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()


def _parse_decoder(spec: Mapping[str, Any] | None, where: Path) -> tuple[_TokenRule, Decoding]:
    """Raises ConfigError for a decoder type that a Llama-like checkpoint does not use."""
    if spec is None:
        return _TokenRule(), Decoding(separator=" ")
    byte_level = byte_fallback = False
    replacements: list[tuple[str, str]] = []
    strip, strip_character = 0, " "
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            byte_level = True
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
            strip = 0 if step.get("prepend_scheme", "always") == "never" else 1
        elif kind == "Strip" and not step["stop"]:
            strip, strip_character = step["start"], step["content"]
        elif kind != "Fuse":
            raise ConfigError(
                f"{where}: decoder {kind!r} is not supported; byte-level BPE and sentencepiece-like decoders "
                "(ByteLevel, Replace of a string, ByteFallback, Fuse, Strip at the start, Metaspace) are"
            )
    rule = _TokenRule(byte_level, byte_fallback, tuple(replacements))
    return rule, Decoding(strip=strip, strip_character=strip_character)


class LibraryVocabulary:
    """A vocabulary of the tokenizers library: `backend` is its own object. Raises ConfigError naming the file."""

    def __init__(self, file: Path) -> None:
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare Exception type
            raise ConfigError(f"{file} is not a tokenizer of the tokenizers library: {error}") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self._rule, self.decoding = _parse_decoder(read_json_object(file).get("decoder"), file)
        self.special_token_ids = frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special)

    def ids(self) -> Iterable[int]:
        return self.backend.get_vocab(with_added_tokens=True).values()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # Unlike the library's `encode`, a batch lets other threads run meanwhile: a megabyte takes a second.
        (encoding,) = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def encode_continuation(self, text: str) -> list[int]:
        if self.decoding.strip:
            head, whole = (self.encode(part, add_special_tokens=False) for part in (_ANCHOR, _ANCHOR + text))
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.encode(text, add_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self._rule.byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        if self._rule.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # a token that only looks like a byte is text
        for old, new in self._rule.replacements:
            token = token.replace(old, new)
        return token.encode("utf-8")


_BYTE_OF = _byte_level_alphabet()
