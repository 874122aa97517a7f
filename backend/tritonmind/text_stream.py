"""The text side of one answer: tokens in, text out, ended by stop strings.

Text that may be the beginning of a stop string is held back until that is decided, and never longer.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tritonmind.messages import FinishReason, TokenLogprob
from tritonmind.sampling_params import SamplingParams
from tritonmind.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextDelta:
    """What some tokens added to an answer.

    token_ids: those that count, ending with the one that completed a stop string. num_tokens: how many.
    stop_reason: the stop string, or the decimal id of the token, that ended the answer; None when neither did.
    logprobs: one for each of token_ids, None if they came without.
    """

    text: str
    num_tokens: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None


class StopMatcher:
    """Finds the first stop string to complete in a text given character by character (Aho-Corasick automaton).

    A state is how much of the most advanced stop string the text ends with, so its depth is exactly how many
    characters must be held back, and the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0

    def fresh(self) -> StopMatcher:
        """One for another text, which shares the tables: they are built once however many answers there are."""
        matcher = copy.copy(self)
        matcher._state = 0
        return matcher

    @property
    def held(self) -> int:
        """Characters at the end of the text that may begin a stop string."""
        return self._depth[self._state]

    def push(self, character: str) -> str | None:
        """The stop string that this character completes, the longest one if several."""
        state = self._state
        while state and character not in self._next[state]:
            state = self._fallback[state]
        self._state = self._next[state].get(character, 0)
        return self._match[self._state]

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
            state = self._next[state][character]
        self._match[state] = stop

    def _link(self) -> None:
        """Breadth first: the fallback of a state is the longest proper suffix that is a state too."""
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            if self._match[state] is None:
                self._match[state] = self._match[self._fallback[state]]
            for character, child in self._next[state].items():
                candidate = self._fallback[state]
                while candidate and character not in self._next[candidate]:
                    candidate = self._fallback[candidate]
                self._fallback[child] = self._next[candidate].get(character, 0)
                states.append(child)


class TextStream:
    """One answer's text. Not thread-safe: it belongs to the thread that answers the request.

    stop: strings that end the answer. Tokens after the one that completes a stop string do not count. What ends the
    answer, a stop string or a token by its id, has no text in it unless include_stop. Special tokens count but have no
    text, unless skip_special_tokens is false. continues: as Tokenizer.detokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        continues: bool = False,
    ) -> None:
        self._new_detokenizer = functools.partial(
            tokenizer.detokenizer, skip_special_tokens=skip_special_tokens, continues=continues
        )
        self._detokenizer = self._new_detokenizer()
        self._include_stop = include_stop
        self._matcher = StopMatcher(stop) if stop else None
        self._pending = ""
        self.finished = False

    def sibling(self) -> TextStream:
        """The stream of another answer to the same request."""
        other = copy.copy(self)
        other._detokenizer = self._new_detokenizer()
        other._pending, other.finished = "", False
        other._matcher = None if self._matcher is None else self._matcher.fresh()
        return other

    def push(
        self,
        token_ids: Sequence[int],
        finished: FinishReason | None = None,
        *,
        stop_token_id: int | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> TextDelta:
        """Take the next tokens of the answer, with their log-probabilities if there are any.

        finished: the engine's finish reason when these are the last. stop_token_id: the id that ended it, which is
        then the last of token_ids. A stop string wins over both, since it ended the answer earlier.
        """
        assert not self.finished, "tokens after the end of an answer"
        ended_by_id = finished is not None and stop_token_id is not None
        parts: list[str] = []
        num_tokens, reason, stop = len(token_ids), finished, str(stop_token_id) if ended_by_id else None
        found: str | None = None
        shown = token_ids[:-1] if ended_by_id and not self._include_stop else token_ids
        if self._matcher is None:
            parts.append(self._detokenizer.push_all(shown))
            shown = ()
        for count, token_id in enumerate(shown, start=1):
            text, found = self._scan(self._detokenizer.push(token_id))
            parts.append(text)
            if found is not None:
                num_tokens, reason, stop = count, "stop", found
                break
        if finished is not None and found is None:
            text, found = self._scan(self._detokenizer.flush())
            parts.append(text)
            if found is not None:
                reason, stop = "stop", found
            else:
                parts.append(self._pending)
        self.finished = reason is not None
        return TextDelta(
            text="".join(parts),
            num_tokens=num_tokens,
            token_ids=list(token_ids[:num_tokens]),
            finish_reason=reason,
            stop_reason=stop if self.finished else None,
            logprobs=None if logprobs is None else list(logprobs[:num_tokens]),
        )

    def _scan(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string that ended it."""
        if self._matcher is None or not text:
            return text, None
        seen = len(self._pending)
        self._pending += text
        for position, character in enumerate(text, start=seen + 1):
            stop = self._matcher.push(character)
            if stop is not None:
                return self._pending[: position if self._include_stop else position - len(stop)], stop
        cut = len(self._pending) - self._matcher.held
        shown, self._pending = self._pending[:cut], self._pending[cut:]
        return shown, None


def text_stream(tokenizer: Tokenizer, params: SamplingParams, *, continues: bool) -> TextStream:
    """The stream of an answer to a request with these options. continues: it goes on from a text, no conversation."""
    return TextStream(
        tokenizer,
        params.stop,
        include_stop=params.include_stop,
        skip_special_tokens=params.skip_special_tokens,
        continues=continues,
    )
