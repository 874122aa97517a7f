"""What crosses the border between the adapter's process and the engine's: msgspec structs, token ids in and out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_LOGPROBS = (
    20  # log-probabilities that a request may ask for at a position, the largest of OpenAI's and vLLM's limits
)


class GuidedDecoding(msgspec.Struct, frozen=True):
    """What an answer's text must be. spec: a JSON schema's text, a regular expression, a grammar in llguidance's Lark.

    `tritonmind.guided.parse_response_format` makes it of what a user writes.
    """

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    spec: str = ""


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request as the engine sees it: everything resolved, no text. What has a default has its neutral value there.

    request_id is unique among live requests (the client numbers them; it is not the user's id).
    """

    request_id: int
    prompt_token_ids: list[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_token_ids: list[int]  # the model's eos ids unless ignore_eos, and the request's own
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    priority: int = 0  # the lower, the earlier it runs and the later it is preempted
    parent_id: int | None = None  # the request with the same prompt that this one waits for, to share its blocks
    min_tokens: int = 0  # before that many, none of stop_token_ids is drawn
    logit_bias: list[tuple[int, float]] = []  # added to the logits of these ids, no id twice
    bad_words: list[list[int]] = []  # runs of token ids that must not come
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens, which then comes from no cache
    num_logprobs: int | None = None  # of the likeliest tokens, at most MAX_LOGPROBS; 0 is the drawn one only
    guided: GuidedDecoding | None = None  # what the answer must be; it then ends at a stop token where it is that

    @property
    def has_penalty(self) -> bool:
        """Whether drawing a token needs to know which ones came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Give up these requests. Unknown or finished ids are ignored."""

    request_ids: list[int]


class Call(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A control call, answered by a Reply with the same call_id."""

    call_id: int
    method: Literal["stats", "check_integrity", "reset_prefix_cache", "shutdown"]


ToEngine = EngineRequest | Abort | Call


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities by the model's own logits: of the drawn token, and (id, value) of the likeliest, in order.

    rank: of the drawn token, 1 for the likeliest.
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one request. The one with a finish_reason is the last for its request.

    num_prompt_tokens: of the request. num_cached_tokens: those whose K and V came from the prefix cache. The first and
    the last output say both; between, where there is nothing to say but a token, they are 0.
    stop_token_id: the id that ended it, which is the last of token_ids. error: set with finish_reason "error".
    queue_time_s: from the engine's taking the request to its first admission; set with the first token.
    logprobs: one for each of token_ids, if the request asked for them. prompt_logprobs: one for each token of the
    prompt but the first, which has None, with the first token of the answer.
    """

    request_id: int
    token_ids: list[int]
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    queue_time_s: float | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine. Blocks: num_free + num_cached + num_used == num_blocks (cached ones are reusable).

    num_jit_compiles: kernels compiled since the engine was ready, each a stall; a warm-up was incomplete if not 0.
    step_cpu_s: CPU time of the engine's thread in its steps, without waiting for the device.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_used_blocks: int
    num_steps: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_finished: int
    num_jit_compiles: int
    step_cpu_s: float = 0.0


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent once, when the engine is ready. memory_plan is text for people, memory_bytes its parts by name."""

    device: str
    dtype: str
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queue_size: int
    vocab_size: int
    quant_policy: int = 0
    memory_plan: str
    memory_bytes: dict[str, int] = {}


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All tokens of one engine step: one message a step, not one a request.

    Most requests have one new token and no more to say: those are request_ids and, as many, token_ids. The rest, among
    them the first and the last output of each request, are in `outputs`.
    """

    request_ids: list[int] = []
    token_ids: list[int] = []
    outputs: list[TokenOutput] = []

    def __len__(self) -> int:
        return len(self.request_ids) + len(self.outputs)

    def __iter__(self) -> Iterator[TokenOutput]:
        """Each request's output, one by one."""
        for request_id, token_id in zip(self.request_ids, self.token_ids, strict=True):
            yield TokenOutput(request_id=request_id, token_ids=[token_id])
        yield from self.outputs


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine loop is alive. Sent a few times a second, busy or idle."""

    stats: EngineStats


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to a Call: stats for "stats", an error text when the call failed."""

    call_id: int
    stats: EngineStats | None = None
    error: str | None = None


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot go on (or could not start). The process exits after sending this."""

    error: str
    code: str


FromEngine = EngineInfo | StepOutputs | Heartbeat | Reply | EngineFailed
