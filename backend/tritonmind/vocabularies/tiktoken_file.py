"""qwen.tiktoken, the vocabulary of Qwen v1, by the tiktoken library: ranks of byte strings, then special tokens."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tritonmind.errors import ConfigError
from tritonmind.vocabularies.base import Decoding

QWEN_FILE = "qwen.tiktoken"
END_OF_TEXT = "<|endoftext|>"
# Their ids follow the last rank, in this order.
QWEN_SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
# How a text is cut before ranks are looked at; the file itself does not say it.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class QwenVocabulary:
    """The vocabulary in `directory`. Raises ConfigError naming the file, or the package that is missing.

    Text is normalised to NFC before it is encoded, as the model's own tokenizer does.
    """

    def __init__(self, directory: Path) -> None:
        file = directory / QWEN_FILE
        try:
            import tiktoken
        except ImportError:
            raise ConfigError(
                f"{file} is a tiktoken vocabulary, which needs the package tiktoken: "
                "pip install 'tritonmind[tokenizers]'"
            ) from None
        ranks = _read_ranks(file)
        self._special = {text: len(ranks) + number for number, text in enumerate(QWEN_SPECIAL_TOKENS)}
        self._encoding: Any = tiktoken.Encoding(
            QWEN_FILE, pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=self._special
        )
        self._bytes = [*ranks, *(text.encode() for text in self._special)]
        self.special_token_ids = frozenset(self._special.values())
        self.special_tokens = {"eos_token": END_OF_TEXT}
        self.decoding = Decoding()

    def ids(self) -> Iterable[int]:
        return range(len(self._bytes))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._encoding.encode(
            unicodedata.normalize("NFC", text), allowed_special="all", disallowed_special=()
        )
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        special = self._special.get(token)
        if special is not None:
            return special
        try:
            token_id: int = self._encoding.encode_single_token(token)
        except KeyError:
            return None
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Byte strings to their ranks, which count from 0 without a gap and are the token ids."""
    ranks: dict[bytes, int] = {}
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ConfigError(f"{file}:{number}: {line[:60]!r} is not a token in base64 and its rank") from None
    if not ranks or list(ranks.values()) != list(range(len(ranks))):
        raise ConfigError(f"{file}: its ranks do not count from 0 without a gap")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ConfigError(f"{file}: it has no token for the byte {missing[0]}")
    return ranks
