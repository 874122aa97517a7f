"""Few tokens of prompts beside many decodes wait a few steps for others, where a step with prompts has its own price.

It has with 4-bit weights, all of which such a step unpacks for rows that hardly fill a tile, and without graphs, where
the host takes long to launch it. After MAX_HELD_STEPS steps without prompts one has some.
"""

from __future__ import annotations

# Beside so many decodes, prompts of fewer tokens than MIN_SHARED_TOKENS together wait.
MANY_DECODES, MIN_SHARED_TOKENS, MAX_HELD_STEPS = 128, 1024, 3


class HoldBack:
    """Asked once a step."""

    def __init__(self) -> None:
        self._num_held_steps = 0

    def holds(self, num_decodes: int, num_prompt_tokens: int) -> bool:
        """Whether this step is to be one of decodes only. num_prompt_tokens: of the prompts that could have a part."""
        are_few = num_decodes >= MANY_DECODES and 0 < num_prompt_tokens < MIN_SHARED_TOKENS
        holds = are_few and self._num_held_steps < MAX_HELD_STEPS
        self._num_held_steps = self._num_held_steps + 1 if holds else 0
        return holds
