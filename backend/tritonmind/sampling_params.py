"""How one request wants its tokens chosen, validated once for every front end.

A value of None means that the request left the field out: `resolve` fills it from the model's generation_config, else
from the neutral default, and clamps `max_tokens` to what the context has left.
"""

from __future__ import annotations

import math

import msgspec

from tritonmind.errors import InvalidRequestError

MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024
MAX_SEED = 2**64 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling options of a request.

    max_tokens: tokens to generate, at least 1. temperature: 0 is greedy. top_k: 0 keeps all. top_p: in (0, 1].
    seed: unsigned 64 bit; the same seed gives the same text whatever else is in the batch. stop: strings that end
    the answer and are not part of it. stop_token_ids: end the answer like eos does. ignore_eos: go on past eos.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequestError("max_tokens", self.max_tokens, "must be at least 1")
        if self.temperature is not None and not (0 <= self.temperature and math.isfinite(self.temperature)):
            raise InvalidRequestError("temperature", self.temperature, "must be a finite number of at least 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 0:
            raise InvalidRequestError("top_k", self.top_k, "must be 0 (all tokens) or positive")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidRequestError("top_p", self.top_p, "must be above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequestError("seed", self.seed, "must fit an unsigned 64-bit integer")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS} are allowed")
        for text in self.stop:
            if not text:
                raise InvalidRequestError("stop", text, "a stop string must not be empty")
            if len(text) > MAX_STOP_STRING_LENGTH:
                raise InvalidRequestError("stop", text, f"a stop string has at most {MAX_STOP_STRING_LENGTH} characters")
        for token_id in self.stop_token_ids:
            if token_id < 0:
                raise InvalidRequestError("stop_token_ids", token_id, "token ids are not negative")
