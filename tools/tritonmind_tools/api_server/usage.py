"""How many tokens a request had, in OpenAI's words."""

from __future__ import annotations

from typing import Any

from tritonmind_tools.console_transport import Delta


class Usage:
    """Tokens of one HTTP request, which may have several prompts."""

    def __init__(self) -> None:
        self.num_output_tokens = 0
        self._prompts: dict[int, tuple[int, int]] = {}  # by number: tokens, cached ones

    def add(self, batch: list[Delta], prompt: int = 0) -> None:
        """Count what came for the prompt of that number."""
        for delta in batch:
            self.num_output_tokens += delta.num_tokens
            if delta.num_input_tokens:
                _, cached = self._prompts.get(prompt, (0, 0))
                self._prompts[prompt] = (delta.num_input_tokens, max(cached, delta.num_cached_tokens))

    @property
    def num_input_tokens(self) -> int:
        return sum(tokens for tokens, _ in self._prompts.values())

    @property
    def num_cached_tokens(self) -> int:
        return sum(cached for _, cached in self._prompts.values())

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_input_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_input_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }
