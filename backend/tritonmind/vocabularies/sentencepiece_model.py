"""tokenizer.model, sentencepiece's own format, by the sentencepiece library itself.

InternLM v1, Llama 2 and Baichuan have no other. Text between special tokens is the library's; the special tokens and
where the space before a text goes are the checkpoint's, by the rules of Transformers' tokenizer for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tritonmind.errors import ConfigError
from tritonmind.vocabularies.base import (
    TOKENIZER_CONFIG_FILE,
    AddedTokenSplitter,
    Decoding,
    read_added_tokens,
    read_json_object,
)

MODEL_FILE = "tokenizer.model"
_SPACE = "\u2581"
# Fields of a ModelProto, to be appended to one: `normalizer_spec { add_dummy_prefix: false }`, and the same with
# `remove_extra_whitespaces: false`. A message that comes twice is merged, the last value of a field counts.
_NO_PREFIX = b"\x1a\x02\x18\x00"
_NO_PREFIX_ALL_SPACES = b"\x1a\x04\x18\x00\x20\x00"


class SentencepieceVocabulary:
    """The vocabulary in `directory`. special_tokens: names to texts; missing ones are filled from the model.

    Settings of tokenizer_config.json that count, with their defaults: add_bos_token (true), add_eos_token (false),
    add_prefix_space (true), legacy (true: the text after each special token gets a space as a text's beginning does).
    Raises ConfigError naming the file that is damaged, or the package that is missing.
    """

    def __init__(self, directory: Path, special_tokens: Mapping[str, str]) -> None:
        file = directory / MODEL_FILE
        self._model = _processor(file)
        whitespace_counts = self._model.normalize("a  b").endswith(f"{_SPACE}{_SPACE}b")
        tail = _NO_PREFIX if whitespace_counts else _NO_PREFIX_ALL_SPACES
        self._continuing = _processor(file, tail)
        settings = read_json_object(directory / TOKENIZER_CONFIG_FILE)
        has_prefix = self._model.normalize("a").startswith(_SPACE) and _setting(settings, "add_prefix_space", True)
        self._beginning = self._model if has_prefix else self._continuing
        self._after_special = self._beginning if _setting(settings, "legacy", True) else self._continuing
        self.special_tokens = {**self._roles(), **special_tokens}
        self._added = read_added_tokens(directory, self.special_tokens.values(), self._piece_id)
        self._splitter = AddedTokenSplitter(self._added)
        self._texts = {token.token_id: text for text, token in self._added.items()}
        pieces = range(self._model.get_piece_size())
        self._bytes = frozenset(i for i in pieces if self._model.is_byte(i))
        hidden = {i for i in pieces if self._model.is_control(i) or self._model.is_unknown(i)}
        self.special_token_ids = frozenset(hidden | {t.token_id for t in self._added.values() if t.special})
        # As the library decodes: one space, of the first token; all, where it also drops superfluous ones.
        strip = sys.maxsize if not whitespace_counts else int(has_prefix)
        self.decoding = Decoding(strip=strip, unstripped_ids=self._bytes)
        self._bos = self._role_id("bos_token") if _setting(settings, "add_bos_token", True) else None
        self._eos = self._role_id("eos_token") if _setting(settings, "add_eos_token", False) else None

    def ids(self) -> Iterable[int]:
        return {*range(self._model.get_piece_size()), *self._texts}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = self._encode(text, self._beginning)
        if not add_special_tokens:
            return ids
        return [*_if_any(self._bos), *ids, *_if_any(self._eos)]

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode(text, self._continuing)

    def token_id(self, token: str) -> int | None:
        added = self._added.get(token)
        return added.token_id if added else self._piece_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._texts:
            return self._texts[token_id].encode()
        if not 0 <= token_id < self._model.get_piece_size():
            return b""
        piece: str = self._model.id_to_piece(token_id)
        if token_id in self._bytes:
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def _encode(self, text: str, beginning: Any) -> list[int]:
        ids: list[int] = []
        encoder = beginning
        for piece in self._splitter.split(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += encoder.encode(piece)
            encoder = self._after_special
        return ids

    def _piece_id(self, token: str) -> int | None:
        token_id: int = self._model.piece_to_id(token)
        return None if self._model.is_unknown(token_id) and self._model.id_to_piece(token_id) != token else token_id

    def _roles(self) -> dict[str, str]:
        model = self._model
        roles = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        return {role: model.id_to_piece(number) for role, number in roles.items() if number >= 0}

    def _role_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.token_id(text)


def _processor(file: Path, tail: bytes = b"") -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ConfigError(
            f"{file} is a sentencepiece vocabulary, which needs the package sentencepiece: "
            "pip install 'tritonmind[tokenizers]'"
        ) from None
    try:
        return SentencePieceProcessor(model_proto=file.read_bytes() + tail)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{file} is not a sentencepiece model: {error}") from None


def _setting(settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name)
    return default if value is None else bool(value)


def _if_any(token_id: int | None) -> tuple[int, ...]:
    return () if token_id is None else (token_id,)
