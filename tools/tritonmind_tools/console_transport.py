"""What a console or a page needs of a model: answers as they come, how to give one up, and how the model is."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tritonmind.errors import ConfigError

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one response added to an answer. finish_reason is set on the last: stop, length or cancelled.

    index: which of the n answers to a request. logprobs, prompt_logprobs: a position each, as
    `tritonmind.senders` writes them: {id: {logprob, rank, decoded_token}}, for the prompt in one response.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | None = None
    index: int = 0
    logprobs: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None


class Transport(Protocol):
    """The way to a model. One answer at a time."""

    @property
    def title(self) -> str:
        """What is talked to, in a few words."""
        ...

    def stream(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Generator[Delta, None, None]:
        """Yield the answer to `messages`; options are fields of SamplingParams. Leaving early cancels it.

        Raises TritonmindError for an answer that failed. Whoever was lost is looked for again by the next call.
        """
        ...

    def cancel(self) -> None:
        """Give up the running answer, from any thread: its last Delta then says "cancelled", at once."""
        ...

    def close(self) -> None:
        """End the conversation's connection."""
        ...


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a model's server is. text: what to show, the reason where it is not ready."""

    is_ready: bool
    text: str


class Source(Protocol):
    """Where models answer: an engine of this process, or a server. Any number of conversations at once."""

    def connect(self) -> Transport:
        """A way for one conversation; close it. Raises TritonmindError if nothing answers."""
        ...

    def status(self) -> Status:
        """How it is now, from any thread, within seconds."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...


def require(*modules: str) -> None:
    """Raise ConfigError naming the first of the extra `client` that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"the package {module} is not installed: pip install 'tritonmind[client]'")


def is_too_long(error: Exception) -> bool:
    """Whether a prompt was refused for its length: in our words, or in those of OpenAI's API."""
    return any(words in str(error) for words in ("session_len", "context length", "context_length"))


def statistics(arrivals: Sequence[tuple[float, Delta]]) -> str:
    """One line on an answer."""
    return f"[{', '.join([*figures(arrivals), finish_reason(arrivals)])}]"


def figures(arrivals: Sequence[tuple[float, Delta]]) -> list[str]:
    """Counts and speed of an answer, or of its beginning.

    tok/s: from the first response on, which is when the prompt has been read.
    """
    deltas = [delta for _, delta in arrivals]
    num_tokens = sum(delta.num_tokens for delta in deltas)
    num_prompt_tokens = max((delta.num_input_tokens for delta in deltas), default=0)
    num_cached_tokens = max((delta.num_cached_tokens for delta in deltas), default=0)
    # Some servers count the prompt with the last response only, or not at all.
    parts = [f"prompt {num_prompt_tokens} tokens, {num_cached_tokens} cached"] if num_prompt_tokens else []
    parts.append(f"answer {num_tokens} tokens")
    with_tokens = [(seconds, delta.num_tokens) for seconds, delta in arrivals if delta.num_tokens]
    if with_tokens:
        (first, num_first), (last, _) = with_tokens[0], with_tokens[-1]
        if last > first:
            parts.append(f"{(num_tokens - num_first) / (last - first):.1f} tok/s")
        parts.append(f"first after {first:.2f} s")
    return parts


def finish_reason(arrivals: Sequence[tuple[float, Delta]]) -> str:
    """Why an answer ended: "cancelled" if it did not get to say so."""
    return next((delta.finish_reason for _, delta in arrivals if delta.finish_reason), "cancelled")
