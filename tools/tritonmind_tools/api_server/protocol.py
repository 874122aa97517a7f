"""Bodies of requests, as pydantic models: OpenAI's fields, and ours beside them. What is unknown is refused.

A field that this server has nothing for is there by its name, and takes only what asks for nothing (`lacking`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from tritonmind.sampling_params import MAX_SEED, SamplingParams
from tritonmind_tools.api_server.fields import (
    Json,
    LogitBias,
    Messages,
    Prompt,
    Stop,
    Texts,
    Tools,
    Turn,
    Variables,
    checked_text,
    lacking,
)

MAX_ANY_SEED = 2**63
SMALLEST_TOP_P = 1e-6  # OpenAI's 0: the likeliest token alone
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

Text = Annotated[
    str, StringConstraints(strict=True), AfterValidator(lambda value, info: checked_text(value, str(info.field_name)))
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Body(BaseModel):
    """Strict: no text for a number, no number for a flag."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: lacking("answers are not padded", False) = None  # type: ignore[valid-type]


def sampling_options(body: Body, *names: str) -> dict[str, Any]:
    """Fields of SamplingParams that a body has by the same names and gives, as the engine takes their values."""
    options = {name: value for name in names if (value := getattr(body, name)) is not None}
    if options.get("top_p") == 0:
        options["top_p"] = SMALLEST_TOP_P
    if options.get("top_k") == -1:
        options["top_k"] = 0
    if -MAX_ANY_SEED <= options.get("seed", 0) < 0:
        options["seed"] &= MAX_SEED
    return options


class Sampling(Body):
    """What chat and text completions share. Left out, an option is that of the model's generation_config.json."""

    model: Text
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias = Field(default_factory=dict)
    seed: int | None = None
    stop: Stop = Field(default_factory=list)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    # Beyond OpenAI's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    bad_words: list[Text] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    response_format: Json = None

    def sampling_params(self, **own: Any) -> SamplingParams:
        """As the engine takes them. Raises InvalidRequestError naming a value out of range."""
        options = sampling_options(
            self,
            "n",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "seed",
            "min_tokens",
            "ignore_eos",
            "skip_special_tokens",
        )
        if self.include_stop_str_in_output is not None:
            options["include_stop"] = self.include_stop_str_in_output
        return SamplingParams(
            logit_bias=self.logit_bias,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            bad_words=tuple(self.bad_words or ()),
            **options,
            **own,
        )


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Tools = None
    tool_choice: Json = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: Variables = None
    renew_session: bool | None = None  # the tutorial's: every request here is a conversation of its own
    # Labels of OpenAI's service, without an effect on an answer.
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    service_tier: lacking("there is one tier", "auto", "default") = None  # type: ignore[valid-type]
    store: lacking("answers are not stored", False) = None  # type: ignore[valid-type]
    metadata: lacking("answers are not stored", {}) = None  # type: ignore[valid-type]
    prompt_cache_retention: lacking("the prefix cache keeps what it has room for", "in_memory") = None  # type: ignore[valid-type]
    prompt_cache_options: lacking("the prefix cache has no options") = None  # type: ignore[valid-type]
    verbosity: lacking("say it in a message", "medium") = None  # type: ignore[valid-type]
    modalities: lacking("answers are text", ["text"]) = None  # type: ignore[valid-type]
    audio: lacking("answers are text") = None  # type: ignore[valid-type]
    prediction: lacking("answers are not predicted") = None  # type: ignore[valid-type]
    web_search_options: lacking("there is no web search") = None  # type: ignore[valid-type]
    moderation: lacking("answers are not moderated") = None  # type: ignore[valid-type]
    functions: lacking("send tools") = None  # type: ignore[valid-type]
    function_call: lacking("send tool_choice") = None  # type: ignore[valid-type]


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: lacking("there is no model for filling gaps", "") = None  # type: ignore[valid-type]


class InteractiveBody(Body):
    """POST /v1/chat/interactive and /generate: LMDeploy's route, whose server remembers conversations.

    session_id: of the conversation; -1 is a new one. interactive_mode: the server remembers it for the next request.
    renew_session: forget what was said before. stop: end the session's running request. An empty prompt without
    interactive_mode ends the session.
    """

    prompt: Turn
    session_id: int = -1
    interactive_mode: bool = False
    renew_session: bool = False
    stream: bool = False
    stop: bool = False
    request_output_len: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    seed: int | None = None


class EncodeBody(Body):
    """POST /v1/encode. do_preprocess: put the text through the chat template. add_bos: begin as a prompt begins."""

    input: Texts
    do_preprocess: bool = False
    add_bos: bool = True
