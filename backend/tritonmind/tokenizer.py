"""Text to token ids and back, whatever file the vocabulary is in.

Decoding goes through the bytes a token stands for, so that a stream of tokens decodes incrementally in constant time
a token and never shows half a character: `decode` is the same detokeniser, fed at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tritonmind.errors import ConfigError
from tritonmind.vocabularies.base import Vocabulary, read_special_tokens
from tritonmind.vocabularies.library import TOKENIZER_FILE, LibraryVocabulary
from tritonmind.vocabularies.sentencepiece_model import MODEL_FILE, SentencepieceVocabulary
from tritonmind.vocabularies.tiktoken_file import QWEN_FILE, QwenVocabulary

# What a tokenizer is read from: the first of these that is there.
VOCABULARY_FILES = (TOKENIZER_FILE, MODEL_FILE, QWEN_FILE)


class IncrementalDetokenizer:
    """Turns a growing list of token ids into text, piece by piece.

    The concatenated results of `push` and one final `flush` are exactly `Tokenizer.decode` of all ids. A character
    whose bytes are not all there yet is held back; bytes that can never become one turn into U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, continues: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._to_strip = 0 if continues else tokenizer.vocabulary.decoding.strip
        self._started = False

    def push(self, token_id: int) -> str:
        """The characters that became complete with this token. Ids outside the vocabulary have no text."""
        return self.push_all((token_id,))

    def push_all(self, token_ids: Iterable[int]) -> str:
        """The characters that became complete with these tokens, at less cost than one by one."""
        tokenizer = self._tokenizer
        hidden: Container[int] = tokenizer.special_token_ids if self._skip_special_tokens else ()
        shown = [i for i in token_ids if i not in hidden and tokenizer.token_bytes(i)]
        if not shown:
            return ""
        pieces = [tokenizer.token_bytes(i) for i in shown]
        decoding = tokenizer.vocabulary.decoding
        separator = decoding.separator.encode()
        if self._started and separator:
            pieces.insert(0, b"")
        if not self._started and shown[0] in decoding.unstripped_ids:
            self._to_strip = 0
        self._started = True
        text = self._utf8.decode(separator.join(pieces))
        return self._strip(text) if self._to_strip else text

    def flush(self) -> str:
        """What was held back, as U+FFFD. Call it once, after the last token."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while text and self._to_strip:
            if not text.startswith(self._tokenizer.vocabulary.decoding.strip_character):
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

    vocabulary: Vocabulary
    special_tokens: Mapping[str, str]
    _bytes: dict[int, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read the first of VOCABULARY_FILES that is there, and what the files beside it say of special tokens.

        Raises ConfigError naming the file that is missing, damaged or not supported, or the package that it needs.
        """
        directory = Path(path)
        special_tokens = read_special_tokens(directory)
        if (directory / TOKENIZER_FILE).is_file():
            return cls(LibraryVocabulary(directory / TOKENIZER_FILE), special_tokens)
        if (directory / MODEL_FILE).is_file():
            sentencepiece = SentencepieceVocabulary(directory, special_tokens)
            return cls(sentencepiece, sentencepiece.special_tokens)
        if (directory / QWEN_FILE).is_file():
            qwen = QwenVocabulary(directory)
            return cls(qwen, qwen.special_tokens | special_tokens)
        raise ConfigError(
            f"{directory} has none of {', '.join(VOCABULARY_FILES)}: the checkpoint's tokenizer belongs in that folder"
        )

    @property
    def special_token_ids(self) -> frozenset[int]:
        return self.vocabulary.special_token_ids

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids that have a token, added ones included."""
        return len(set(self.vocabulary.ids()))

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
        return max(len(self.token_bytes(token_id)) for token_id in self.vocabulary.ids())

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised either way."""
        return self.vocabulary.encode(text, add_special_tokens=add_special_tokens)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that has some before it: without bos, and without the space that some tokenizers add."""
        return self.vocabulary.encode_continuation(text)

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
        """Text of `ids`. Equal to the vocabulary's library's own decoding wherever the ids form whole characters.

        Where they don't, each maximal broken byte sequence is one U+FFFD; byte fallback of the tokenizers library would
        also throw away the valid characters beside it.
        """
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push_all(ids) + detokenizer.flush()

    def detokenizer(self, *, skip_special_tokens: bool = True, continues: bool = False) -> IncrementalDetokenizer:
        """continues: the text goes on from another one, so a space that it begins with is its own."""
        return IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens, continues=continues)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, perhaps part of a character, that a token adds to the text. Empty for an unknown id."""
        piece = self._bytes.get(token_id)
        if piece is None:
            piece = self._bytes[token_id] = self.vocabulary.token_bytes(token_id)
        return piece

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.vocabulary.token_id(token)
