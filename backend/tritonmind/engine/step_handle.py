"""A launched step: what it draws is on its way to the host, or its draw waits for the tokens of the steps before."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tritonmind.engine.logprobs import PendingLogprobs
from tritonmind.engine.staging import PendingDraw
from tritonmind.messages import TokenLogprob
from tritonmind.sequence import Sequence


class StepResult(NamedTuple):
    """What a step drew, in the order of the scheduler's sampling items. logprobs: None if no request asked for any.

    prompt_logprobs: for each prefill, of the tokens that follow its own in the prompt; None if no request asked.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None
    prompt_logprobs: list[list[TokenLogprob]] | None


class Drawn(NamedTuple):
    """What a step draws, on its way to the host. failed: guided sequences that cannot go on."""

    token_ids: PendingDraw
    logprobs: PendingLogprobs | None = None
    failed: tuple[Sequence, ...] = ()


class StepHandle:
    """A launched step. One with guided answers waits with its draw for `draw`."""

    def __init__(
        self,
        drawn: Drawn | Callable[[], Drawn],
        prompts: list[list[PendingLogprobs]] | None = None,
    ) -> None:
        self._drawn = drawn
        self._prompts = prompts

    def draw(self) -> list[Sequence]:
        """Launch the draw, if it is not: the tokens of all steps before must be known. Before that nobody may `wait`.

        Returns guided sequences that cannot go on: their guides say why, and their tokens mean nothing.
        """
        if isinstance(self._drawn, Drawn):
            return []
        self._drawn = self._drawn()
        return list(self._drawn.failed)

    def wait(self) -> StepResult:
        """Block until the step's results are on the host; later steps go on."""
        assert isinstance(self._drawn, Drawn), "a guided step was not drawn"
        token_ids = self._drawn.token_ids.wait()
        prompts = None
        if self._prompts is not None:
            prompts = [[row for part in parts for row in part.take() if row is not None] for parts in self._prompts]
        draws = self._drawn.logprobs
        return StepResult(token_ids, None if draws is None else draws.take(), prompts)
