"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tritonmind_tools.api_server.backends import Position
from tritonmind_tools.console_transport import Delta

if TYPE_CHECKING:
    from tritonmind.tokenizer import Tokenizer

REPLACEMENT = "�"
SMALLEST = -9999.0  # OpenAI's value for a token that is as good as impossible


def chat_logprobs(delta: Delta, num_top: int, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """A chat completion's, one for each token of `delta` with the num_top likeliest ones."""
    return [
        {
            **_entry(token_id, position[str(token_id)], tokenizer),
            "top_logprobs": [_entry(int(key), value, tokenizer) for key, value in _likeliest(position, num_top)],
        }
        for token_id, position in zip(delta.token_ids, delta.logprobs, strict=True)
    ]


class CompletionLogprobs:
    """A text completion's, in the making: lists of as many entries as there are tokens.

    text_offset is where in the text a token is: the same for those that make one character together, that of what
    follows for a special token that is not in the text. Without a tokenizer each counts for as long as its own text.
    """

    def __init__(self, num_top: int, tokenizer: Tokenizer | None, *, skip_special_tokens: bool) -> None:
        self._num_top = num_top
        self._tokenizer = tokenizer
        self._detokenizer = (
            None
            if tokenizer is None
            else tokenizer.detokenizer(skip_special_tokens=skip_special_tokens, continues=True)
        )
        self._next_offset = 0

    def of_prompt(self, token_ids: list[int], positions: list[Position | None], text: str) -> dict[str, Any]:
        """The prompt's, which the text begins with. Its first token has no log-probability."""
        assert self._tokenizer is not None
        self._next_offset = len(text)
        return self._entries(token_ids, positions) | {"text_offset": _offsets(self._tokenizer, token_ids, text)}

    def of(self, token_ids: list[int], positions: Sequence[Position]) -> dict[str, Any]:
        """The answer's next tokens'."""
        body = self._entries(token_ids, positions)
        offsets = []
        for token_id, token in zip(token_ids, body["tokens"], strict=True):
            offsets.append(self._next_offset)
            self._next_offset += len(token if self._detokenizer is None else self._detokenizer.push(token_id))
        return body | {"text_offset": offsets}

    def _entries(self, token_ids: list[int], positions: Sequence[Position | None]) -> dict[str, Any]:
        body: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        for token_id, position in zip(token_ids, positions, strict=True):
            if position is None:
                assert self._tokenizer is not None
                body["tokens"].append(_text_of(self._tokenizer, token_id))
                body["token_logprobs"].append(None)
                body["top_logprobs"].append(None)
                continue
            entry = position[str(token_id)]
            body["tokens"].append(entry["decoded_token"])
            body["token_logprobs"].append(_finite(entry["logprob"]))
            body["top_logprobs"].append(
                {value["decoded_token"]: _finite(value["logprob"]) for _, value in self._shown(token_id, position)}
            )
        return body

    def _shown(self, token_id: int, position: Position) -> list[tuple[str, dict[str, Any]]]:
        """The likeliest, and the token itself."""
        shown = _likeliest(position, self._num_top)
        key = str(token_id)
        return shown if any(key == other for other, _ in shown) else [*shown, (key, position[key])]


def _offsets(tokenizer: Tokenizer, token_ids: list[int], text: str) -> list[int]:
    """Where the tokens of a prompt are in its text, which has those special tokens that were written out in it."""
    detokenizer = tokenizer.detokenizer()
    offsets, offset = [], 0
    for token_id in token_ids:
        offsets.append(offset)
        written = _text_of(tokenizer, token_id) if token_id in tokenizer.special_token_ids else ""
        if written and text.startswith(written, offset):
            offset += len(written)
        else:
            offset += len(detokenizer.push(token_id))
    return offsets


def _text_of(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode(errors="replace")


def _likeliest(position: Position, number: int) -> list[tuple[str, dict[str, Any]]]:
    return sorted(position.items(), key=lambda item: item[1]["rank"])[:number]


def _entry(token_id: int, value: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Without a tokenizer the bytes of half a character are not known."""
    token = value["decoded_token"]
    encoded: bytes | None = None
    if tokenizer is not None:
        encoded = tokenizer.token_bytes(token_id)
    elif REPLACEMENT not in token:
        encoded = token.encode()
    return {
        "token": token,
        "logprob": _finite(value["logprob"]),
        "bytes": None if encoded is None else list(encoded),
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, SMALLEST)
