"""Which logits of a step are changed before the draw: logit_bias, min_tokens and bad_words of its requests.

Of a sequence whose last token is still on its way from the device only the tokens before are known here. A bad word
that those have begun is then forbidden on condition: the device compares its last token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from tritonmind.engine.scheduler_output import ScheduledSequence
from tritonmind.kernels import edit_logits
from tritonmind.messages import EngineRequest
from tritonmind.sequence import Sequence

ALWAYS = -1


class LogitEdits(NamedTuple):
    """Of one step, [4, count] int32 each: rows, token ids, bits of the fp32 values, conditions.

    Biases come first: a ban wins over a bias of the same token.
    """

    biases: np.ndarray
    bans: np.ndarray

    def apply(self, logits: torch.Tensor, slots: torch.Tensor, last_token_ids: torch.Tensor) -> None:
        """Change the step's logits [R, vocab_size] in place, in the order of the current stream."""
        for packed in self:
            if packed.size:
                edits = torch.from_numpy(packed)
                if logits.is_cuda:
                    edits = edits.pin_memory().to(logits.device, non_blocking=True)
                rows, token_ids, values, conditions = edits
                edit_logits(logits, rows, token_ids, values.view(torch.float32), conditions, slots, last_token_ids)


class _Constants(NamedTuple):
    """What of a request's edits is the same at every position, [4, count] int32 with rows of 0."""

    admission: int
    biases: np.ndarray
    stop_bans: np.ndarray
    word_bans: np.ndarray  # of words that are one token
    longer_words: list[list[int]]


class LogitEditor:
    """Plans the edits of each step. Keeps by slot what a request asks for at every position."""

    def __init__(self) -> None:
        self._constants: dict[int, _Constants] = {}

    def plan(self, sampling: list[ScheduledSequence]) -> LogitEdits | None:
        """The edits of a step's sampling rows, None if there are none."""
        biases: list[np.ndarray] = []
        bans: list[np.ndarray] = []
        for row, item in enumerate(sampling):
            request = item.seq.request
            if not (request.logit_bias or request.bad_words or request.min_tokens):
                continue
            constants = self._constants_of(item.seq)
            if constants.biases.size:
                biases.append(_in_row(constants.biases, row))
            position = item.start + item.num_new_tokens
            if position - item.seq.num_prompt_tokens < request.min_tokens and constants.stop_bans.size:
                bans.append(_in_row(constants.stop_bans, row))
            if constants.word_bans.size:
                bans.append(_in_row(constants.word_bans, row))
            for word in constants.longer_words:
                condition = _completes(item.seq, position, word)
                if condition is not None:
                    bans.append(_pack([word[-1]], [-np.inf], row, condition))
        if not biases and not bans:
            return None
        nothing = [np.zeros((4, 0), dtype=np.int32)]
        return LogitEdits(np.concatenate(biases or nothing, axis=1), np.concatenate(bans or nothing, axis=1))

    def _constants_of(self, seq: Sequence) -> _Constants:
        known = self._constants.get(seq.slot)
        if known is None or known.admission != seq.admission:
            known = _constants(seq.request, seq.admission)
            self._constants[seq.slot] = known
        return known


def warm_up_edits(logits: torch.Tensor, slots: torch.Tensor, last_token_ids: torch.Tensor) -> None:
    """Run the kernel without an effect."""
    nothing = _pack([0], [0.0], 0, ALWAYS)
    LogitEdits(nothing, nothing[:, :0]).apply(logits, slots.clamp(min=0), last_token_ids)


def _constants(request: EngineRequest, admission: int) -> _Constants:
    ids, values = zip(*request.logit_bias, strict=True) if request.logit_bias else ((), ())
    stop_ids = request.stop_token_ids if request.min_tokens else []
    single = [word[0] for word in request.bad_words if len(word) == 1]
    return _Constants(
        admission,
        biases=_pack(list(ids), list(values), 0, ALWAYS),
        stop_bans=_pack(stop_ids, [-np.inf] * len(stop_ids), 0, ALWAYS),
        word_bans=_pack(single, [-np.inf] * len(single), 0, ALWAYS),
        longer_words=[word for word in request.bad_words if len(word) > 1],
    )


def _pack(token_ids: list[int], values: list[float], row: int, condition: int) -> np.ndarray:
    packed = np.empty((4, len(token_ids)), dtype=np.int32)
    packed[0], packed[1], packed[3] = row, token_ids, condition
    packed[2] = np.array(values, dtype=np.float32).view(np.int32)
    return packed


def _in_row(packed: np.ndarray, row: int) -> np.ndarray:
    moved = packed.copy()
    moved[0] = row
    return moved


def _completes(seq: Sequence, position: int, word: list[int]) -> int | None:
    """Under which condition the token at `position` would complete `word`: the id of the token before, or ALWAYS.

    None: it cannot, whatever the token before turns out to be.
    """
    token_ids, begin = seq.token_ids, position - len(word) + 1
    num_unknown = position - len(token_ids) if position > len(token_ids) else 0
    assert num_unknown <= 1, "more than one token of a sequence is in flight"
    last = len(word) - 2 - num_unknown  # index in the word of the last token that is known here; most fail at it
    if begin < 0 or (last >= 0 and token_ids[begin + last] != word[last]):
        return None
    if token_ids[begin : begin + last] != word[: max(last, 0)]:
        return None
    return word[-2] if num_unknown else ALWAYS
