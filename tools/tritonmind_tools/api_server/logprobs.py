"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

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
    """A text completion's, in the making: lists of as many entries as there are tokens."""

    def __init__(self, num_top: int, tokenizer: Tokenizer | None) -> None:
        self._num_top = num_top
        self._tokenizer = tokenizer
        self._next_offset = 0

    def of(self, token_ids: list[int], positions: list[Position | None]) -> dict[str, Any]:
        """The next tokens'. The first of a prompt has no log-probability."""
        body: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, position in zip(token_ids, positions, strict=True):
            entry = None if position is None else position[str(token_id)]
            token = self._text(token_id) if entry is None else entry["decoded_token"]
            body["tokens"].append(token)
            body["token_logprobs"].append(None if entry is None else _finite(entry["logprob"]))
            body["top_logprobs"].append(
                None
                if position is None
                else {value["decoded_token"]: _finite(value["logprob"]) for _, value in self._shown(token_id, position)}
            )
            body["text_offset"].append(self._next_offset)
            self._next_offset += len(token)
        return body

    def _text(self, token_id: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _shown(self, token_id: int, position: Position) -> list[tuple[str, dict[str, Any]]]:
        """The likeliest, and the token itself."""
        shown = _likeliest(position, self._num_top)
        key = str(token_id)
        return shown if any(key == other for other, _ in shown) else [*shown, (key, position[key])]


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
