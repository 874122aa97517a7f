"""Text to token ids and back, on the `tokenizers` library alone.

Decoding goes through the bytes a token stands for, so that a stream of tokens decodes incrementally in constant time
a token and never shows half a character: `decode` is the same detokeniser, fed at once.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from tritonmind.errors import ConfigError

# Stands for the text before a continuation: ends a line in every vocabulary, grows together with no text after it.
ANCHOR = "\n"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"


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


def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte of GPT-2's byte-level BPE: printable bytes are themselves, the rest sit from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True)
class _Decoder:
    """What tokenizer.json's `decoder` does, reduced to one rule a token and one for the start of the text.

    replacements: applied to a token's text in order. byte_fallback: tokens <0x00> to <0xFF> are bytes.
    strip: how many leading `strip_character`s the finished text loses. separator: between tokens.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip_character: str = " "
    strip: int = 0
    separator: str = ""


def _parse_decoder(spec: Mapping[str, Any] | None, where: Path) -> _Decoder:
    """Raises ConfigError for a decoder type that a Llama-like checkpoint does not use."""
    if spec is None:
        return _Decoder(separator=" ")
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
    return _Decoder(byte_level, byte_fallback, tuple(replacements), strip_character, strip)


class IncrementalDetokenizer:
    """Turns a growing list of token ids into text, piece by piece.

    The concatenated results of `push` and one final `flush` are exactly `Tokenizer.decode` of all ids. A character
    whose bytes are not all there yet is held back; bytes that can never become one turn into U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._to_strip = tokenizer.decoder.strip
        self._started = False

    def push(self, token_id: int) -> str:
        """The characters that became complete with this token. Ids outside the vocabulary have no text."""
        return self.push_all((token_id,))

    def push_all(self, token_ids: Iterable[int]) -> str:
        """The characters that became complete with these tokens, at less cost than one by one."""
        tokenizer = self._tokenizer
        hidden: Container[int] = tokenizer.special_token_ids if self._skip_special_tokens else ()
        pieces = [piece for i in token_ids if i not in hidden and (piece := tokenizer.token_bytes(i))]
        if not pieces:
            return ""
        separator = tokenizer.decoder.separator.encode()
        if self._started and separator:
            pieces.insert(0, b"")
        self._started = True
        text = self._utf8.decode(separator.join(pieces))
        return self._strip(text) if self._to_strip else text

    def flush(self) -> str:
        """What was held back, as U+FFFD. Call it once, after the last token."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while text and self._to_strip:
            if not text.startswith(self._tokenizer.decoder.strip_character):
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer. Immutable from outside, shared by all threads.

    special_tokens: names as in tokenizer_config.json ("bos_token", "eos_token" ...) to their text.
    """

    backend: tokenizers.Tokenizer
    decoder: _Decoder
    special_tokens: Mapping[str, str]
    special_token_ids: frozenset[int]
    _bytes: dict[int, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, and the names of the special tokens from the files beside it when they are there.

        Raises ConfigError naming the file that is missing, damaged or not supported.
        """
        directory = Path(path)
        file = directory / TOKENIZER_FILE
        if not file.is_file():
            raise ConfigError(f"{file} is missing: convert the checkpoint again, its tokenizer belongs in that folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare Exception type
            raise ConfigError(f"{file} is not a tokenizer of the tokenizers library: {error}") from None
        backend.no_truncation()
        backend.no_padding()
        special_tokens: dict[str, str] = {}
        for name in (SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE):
            for key, value in read_json_object(directory / name).items():
                text = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(text, str):
                    special_tokens[key] = text
        return cls(
            backend=backend,
            decoder=_parse_decoder(read_json_object(file).get("decoder"), file),
            special_tokens=special_tokens,
            special_token_ids=frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a token, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of(self.eos_token)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token. A text of n bytes makes at least n / longest_token tokens.

        Except where a tokenizer drops or merges what it does not know, as no Llama-like one does with real text.
        """
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        return max(len(self.token_bytes(token_id)) for token_id in ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised either way."""
        # Unlike the library's `encode`, a batch lets other threads run meanwhile: a megabyte takes a second.
        (encoding,) = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that has some before it: without bos, and without the space that some tokenizers add."""
        if self.decoder.strip:
            head, whole = (self.encode(part, add_special_tokens=False) for part in (ANCHOR, ANCHOR + text))
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.encode(text, add_special_tokens=False)

    def encode_word(self, text: str) -> list[list[int]]:
        """The runs of token ids that `text` may be written as within an answer: as it is, and after a space."""
        word = text.lstrip(" ")
        runs = [self.encode_continuation(variant) for variant in (text, word, f" {word}")]
        return [run for number, run in enumerate(runs) if run and run not in runs[:number]]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the model expects around it.

        Text that begins with the bos token was rendered by a chat template: nothing is added, so no second bos.
        """
        rendered = self.bos_token is not None and text.startswith(self.bos_token)
        return self.encode(text, add_special_tokens=not rendered)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Equal to the library's own decoding wherever the ids form whole characters.

        Where they don't, each maximal broken byte sequence is one U+FFFD; the library's byte fallback would also
        throw away the valid characters beside it.
        """
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push_all(ids) + detokenizer.flush()

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, perhaps part of a character, that a token adds to the text. Empty for an unknown id."""
        piece = self._bytes.get(token_id)
        if piece is None:
            piece = self._bytes[token_id] = self._decode_token(token_id)
        return piece

    def _decode_token(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self.decoder.byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        if self.decoder.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # a token that only looks like a byte is text
        for old, new in self.decoder.replacements:
            token = token.replace(old, new)
        return token.encode("utf-8")

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)


_BYTE_OF = _byte_level_alphabet()
