"""What the API server needs of a model: answers as they come, from an engine here or from a Triton server."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from tritonmind.request_fields import ParsedRequest
from tritonmind_tools.console_transport import Delta

if TYPE_CHECKING:
    from tritonmind.chat_template import ChatTemplate
    from tritonmind.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The model behind a server. What it does not say is None.

    max_model_len: tokens of prompt and answer together.
    """

    name: str
    created: int
    max_model_len: int | None = None
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None


class Backend(Protocol):
    """Used by one asyncio loop, except for `close`."""

    @property
    def model(self) -> ServedModel: ...

    async def connect(self) -> None:
        """Called once, in the loop that the other methods are called in. Raises UnavailableError."""

    def answer(self, request: ParsedRequest) -> AsyncGenerator[list[Delta], None]:
        """Yield what came since the last time, one Delta for each of the n answers that has something to say.

        Everything that is pending comes at once. The last Delta of each answer has its finish_reason. Closing it early
        cancels the request. Raises TritonmindError.
        """
        ...

    async def is_ready(self) -> bool:
        """Whether requests can be answered now."""
        ...

    def metrics(self) -> str:
        """The model's metrics as Prometheus' text."""
        ...

    def close(self) -> None:
        """Let go of the model, when no request is live any more."""


def merged(batches: list[list[Delta]]) -> list[Delta]:
    """Several batches of one request as one."""
    if len(batches) == 1:
        return batches[0]
    deltas: dict[int, list[Delta]] = {}
    for batch in batches:
        for delta in batch:
            deltas.setdefault(delta.index, []).append(delta)
    return [parts[0] if len(parts) == 1 else _joined(parts) for parts in deltas.values()]


def _joined(parts: list[Delta]) -> Delta:
    return replace(
        parts[-1],
        text="".join([part.text for part in parts]),
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        num_tokens=sum([part.num_tokens for part in parts]),
        logprobs=[logprob for part in parts for logprob in part.logprobs],
        prompt_logprobs=next((part.prompt_logprobs for part in parts if part.prompt_logprobs is not None), None),
    )


Position = dict[str, dict[str, Any]]
