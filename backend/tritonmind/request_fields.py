"""The request as a Triton client sends it: which fields there are, and how they become one validated object.

A sampling option may come as a tensor, inside the JSON of `sampling_parameters`, or as a request parameter. Given
more than once, the values must agree.
"""

from __future__ import annotations

import dataclasses
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from tritonmind.chat_template import Message, parse_messages, parse_template_variables, parse_tools
from tritonmind.errors import InvalidRequestError
from tritonmind.guided import FIELD, parse_guide, parse_response_format, parse_structured_outputs
from tritonmind.sampling_params import SamplingParams

TritonType = Literal["TYPE_STRING", "TYPE_BOOL", "TYPE_INT32", "TYPE_UINT32", "TYPE_UINT64", "TYPE_FP32"]


class TensorField(NamedTuple):
    """A tensor of the model's interface. dims: 1 is one value, -1 any number."""

    name: str
    data_type: TritonType
    dims: int


MAX_TIMEOUT_MS = 2**31 - 1
MAX_NAME_LENGTH = 64
PROMPT_FIELDS = ("text_input", "input_ids", "messages")
# What goes to the chat template with messages.
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")

INPUTS = (
    TensorField("text_input", "TYPE_STRING", 1),
    TensorField("input_ids", "TYPE_INT32", -1),
    TensorField("messages", "TYPE_STRING", 1),
    TensorField("tools", "TYPE_STRING", 1),
    TensorField("chat_template_kwargs", "TYPE_STRING", 1),
    TensorField("session_id", "TYPE_UINT64", 1),
    TensorField("sequence_start", "TYPE_BOOL", 1),
    TensorField("sequence_end", "TYPE_BOOL", 1),
    TensorField("session_stop", "TYPE_BOOL", 1),
    TensorField("step", "TYPE_INT32", 1),
    TensorField("cancel", "TYPE_BOOL", 1),
    TensorField("priority", "TYPE_INT32", 1),
    TensorField("timeout_ms", "TYPE_INT32", 1),
    TensorField("stream", "TYPE_BOOL", 1),
    TensorField("streaming", "TYPE_BOOL", 1),
    TensorField("exclude_input_in_output", "TYPE_BOOL", 1),
    TensorField("sampling_parameters", "TYPE_STRING", 1),
    TensorField("n", "TYPE_INT32", 1),
    TensorField("max_tokens", "TYPE_INT32", 1),
    TensorField("min_tokens", "TYPE_INT32", 1),
    TensorField("min_length", "TYPE_INT32", 1),
    TensorField("temperature", "TYPE_FP32", 1),
    TensorField("top_k", "TYPE_INT32", 1),
    TensorField("top_p", "TYPE_FP32", 1),
    TensorField("min_p", "TYPE_FP32", 1),
    TensorField("repetition_penalty", "TYPE_FP32", 1),
    TensorField("presence_penalty", "TYPE_FP32", 1),
    TensorField("frequency_penalty", "TYPE_FP32", 1),
    TensorField("logit_bias", "TYPE_STRING", 1),
    TensorField("bad_words", "TYPE_STRING", -1),
    TensorField("seed", "TYPE_UINT64", 1),
    TensorField("stop", "TYPE_STRING", -1),
    TensorField("stop_words", "TYPE_STRING", -1),
    TensorField("stop_token_ids", "TYPE_INT32", -1),
    TensorField("include_stop", "TYPE_BOOL", 1),
    TensorField("ignore_eos", "TYPE_BOOL", 1),
    TensorField("skip_special_tokens", "TYPE_BOOL", 1),
    TensorField("response_format", "TYPE_STRING", 1),
    TensorField("num_logprobs", "TYPE_INT32", 1),
    TensorField("num_prompt_logprobs", "TYPE_INT32", 1),
    TensorField("return_token_ids", "TYPE_BOOL", 1),
    TensorField("return_finish_reason", "TYPE_BOOL", 1),
    TensorField("return_num_input_tokens", "TYPE_BOOL", 1),
    TensorField("return_num_output_tokens", "TYPE_BOOL", 1),
    TensorField("return_logprobs", "TYPE_BOOL", 1),
    TensorField("return_cumulative_logprob", "TYPE_BOOL", 1),
    TensorField("image", "TYPE_STRING", -1),
    TensorField("lora_name", "TYPE_STRING", 1),
    TensorField("guided_decoding_guide_type", "TYPE_STRING", 1),
    TensorField("guided_decoding_guide", "TYPE_STRING", 1),
    TensorField("embedding_request", "TYPE_STRING", 1),
)

OUTPUTS = (
    TensorField("text_output", "TYPE_STRING", -1),
    TensorField("token_ids", "TYPE_INT32", -1),
    TensorField("finish_reason", "TYPE_STRING", -1),
    TensorField("stop_reason", "TYPE_STRING", -1),
    TensorField("num_input_tokens", "TYPE_UINT32", 1),
    TensorField("num_output_tokens", "TYPE_UINT32", -1),
    TensorField("num_cached_tokens", "TYPE_UINT32", 1),
    TensorField("cumulative_logprob", "TYPE_FP32", -1),
    TensorField("logprobs", "TYPE_STRING", -1),
    TensorField("prompt_logprobs", "TYPE_STRING", 1),
)

_INPUT_BY_NAME = {field.name: field for field in INPUTS}
# NumPy's kinds of numbers for each type, of any width.
_KINDS = {
    "TYPE_STRING": "OSU",
    "TYPE_BOOL": "b",
    "TYPE_INT32": "iu",
    "TYPE_UINT32": "iu",
    "TYPE_UINT64": "iu",
    "TYPE_FP32": "fiu",
}
_SPELLINGS = {
    "streaming": "stream",
    "stop_words": "stop",
    "min_length": "min_tokens",
    "logprobs": "num_logprobs",
    "prompt_logprobs": "num_prompt_logprobs",
    "include_stop_str_in_output": "include_stop",
    "structured_outputs": FIELD,
}
# As TensorRT-LLM's backend has what others call response_format: in two inputs.
_GUIDE_TYPE, _GUIDE = "guided_decoding_guide_type", "guided_decoding_guide"
# What clients of other backends may send and this one has no answer to: refused by name, never left out silently.
_UNSUPPORTED = {
    "image": "models that see images are not served",
    "lora_name": "adapters are not served: merge the adapter into the checkpoint",
    "embedding_request": "embeddings are not served",
    "best_of": "send n requests and choose",
    "use_beam_search": "beam search is not available",
    "beam_width": "beam search is not available",
}
# Outputs that a request gets when it asks for log-probabilities, or names them.
_LOGPROB_OUTPUTS = frozenset({"logprobs", "cumulative_logprob"})
# By what requests call them; what response_format asks for is called guided from then on.
_SAMPLING_TYPES: dict[str, Any] = typing.get_type_hints(SamplingParams)
_SAMPLING_TYPES[FIELD] = _SAMPLING_TYPES.pop("guided")
_FLAG_TYPES: dict[str, Any] = {field.name: bool for field in INPUTS if field.data_type == "TYPE_BOOL"}
# Whole numbers of a request, each from 0 to the largest value of its tensor's type.
_NUMBER_LIMITS = {"session_id": 2**64 - 1, "step": 2**31 - 1, "priority": 2**31 - 1}
_OPTION_TYPES = _FLAG_TYPES | _SAMPLING_TYPES | dict.fromkeys(_NUMBER_LIMITS, int)
_OPTION_TYPES |= {_GUIDE_TYPE: str, _GUIDE: str}
_OPTION_TYPES |= {"timeout_ms": float, "timeout": int}  # timeout is the Triton server's own, in microseconds
# What the server and its clients put among the parameters for their own use.
_FOREIGN_PARAMETERS = frozenset({"id"})
_FOREIGN_PREFIXES = ("triton_", "sequence_", "x-")


@dataclass(frozen=True, kw_only=True)
class SessionFields:
    """What a request has to do with a session. step: go on from that many tokens of its history; None: from all."""

    session_id: int
    start: bool = False
    end: bool = False
    stop: bool = False
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class ParsedRequest:
    """A request whose fields are checked. Exactly one of text, input_ids and messages is set, unless it is an order.

    tools, template_variables: what the chat template is given with messages.
    request_id: the client's name for it, "" for none. cancel: end the requests of that name. priority: the lower, the
    earlier; 0 stands for the default. timeout_ms: from the arrival, None for no limit. echo: the answer starts with
    the prompt's text. outputs: names of the tensors the client wants.
    """

    text: str | None = None
    input_ids: list[int] | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    template_variables: dict[str, Any] | None = None
    session: SessionFields | None = None
    request_id: str = ""
    cancel: bool = False
    priority: int = 0
    timeout_ms: float | None = None
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    stream: bool = False
    echo: bool = False
    outputs: frozenset[str] = frozenset(field.name for field in OUTPUTS) - _LOGPROB_OUTPUTS - {"prompt_logprobs"}

    @property
    def is_order(self) -> bool:
        """Whether it has no prompt and only acts on a session or another request."""
        return self.text is None and self.input_ids is None and self.messages is None


class _Options:
    """Options by name, each with where its value came from; a second, different value is an error."""

    def __init__(self) -> None:
        self._given: dict[str, tuple[str, Any]] = {}

    def add(self, name: str, value: Any, source: str) -> None:
        if name in _UNSUPPORTED:
            raise InvalidRequestError(name, value, f"{_UNSUPPORTED[name]}; leave it out")
        canonical = _SPELLINGS.get(name, name)
        value = parse_structured_outputs(value) if name == "structured_outputs" else _convert(canonical, value)
        if canonical in self._given:
            other_source, other = self._given[canonical]
            if not _same(value, other):
                raise InvalidRequestError(
                    name, value, f"{source} contradicts {other_source}, which says {reprlib.repr(other)}"
                )
        else:
            self._given[canonical] = (source, value)

    def add_json(self, text: str, source: str) -> None:
        try:
            for name, value in _json_options(text).items():
                self.add(name, value, source)
        except RecursionError:  # from decoding, or from an error that shows what was decoded
            raise InvalidRequestError("sampling_parameters", text, "is nested too deeply") from None

    def flag(self, name: str, default: bool) -> bool:
        return self._given[name][1] if name in self._given else default

    def number(self, name: str) -> int | None:
        value = self._given[name][1] if name in self._given else None
        limit = _NUMBER_LIMITS[name]
        if value is not None and not 0 <= value <= limit:
            raise InvalidRequestError(name, value, f"must be 0 to {limit}")
        return value

    def timeout_ms(self) -> float | None:
        """None for no limit, which 0 means too, as with the Triton server."""
        value = self._given["timeout_ms"][1] if "timeout_ms" in self._given else 0.0
        if not 0 <= value <= MAX_TIMEOUT_MS:
            raise InvalidRequestError("timeout_ms", value, f"must be 0 (no limit) to {MAX_TIMEOUT_MS} milliseconds")
        return value or None

    def sampling_params(self) -> SamplingParams:
        values = {name: value for name, (_, value) in self._given.items() if name in _SAMPLING_TYPES}
        if any(self.flag(f"return_{name}", False) for name in _LOGPROB_OUTPUTS):
            values.setdefault("num_logprobs", 0)
        if _GUIDE_TYPE in self._given or _GUIDE in self._given:
            kind, guide = (self._given.get(name, ("", None))[1] for name in (_GUIDE_TYPE, _GUIDE))
            if FIELD in values:
                raise InvalidRequestError(_GUIDE_TYPE, kind, f"goes without {FIELD}: leave one out")
            values[FIELD] = parse_guide(kind, guide)
        if FIELD in values:
            values["guided"] = values.pop(FIELD)
        return SamplingParams(**values)


def parse_request(
    tensors: Mapping[str, np.ndarray],
    parameters: Mapping[str, Any],
    requested_outputs: list[str],
    *,
    request_id: str = "",
) -> ParsedRequest:
    """Check everything about a request that needs neither the model nor the tokenizer.

    tensors: the inputs that were sent, any shape with the right number of values (a leading batch dimension of 1 is
    fine). parameters: the request's own, read last. requested_outputs: empty means all. Raises InvalidRequestError.
    """
    prompts = [name for name in PROMPT_FIELDS if name in tensors]
    options = _Options()
    for name, array in tensors.items():
        if name not in (*PROMPT_FIELDS, *TEMPLATE_FIELDS, "sampling_parameters"):
            options.add(name, _values(name, array), f"the input {name}")
    if "sampling_parameters" in tensors:
        options.add_json(_values("sampling_parameters", tensors["sampling_parameters"]), "sampling_parameters")
    for name, value in parameters.items():
        if name == "sampling_parameters":
            options.add_json(str(value), "sampling_parameters among the request's parameters")
        elif name == "timeout":
            options.add("timeout_ms", _timeout_ms(value), "the request's parameter timeout")
        elif name in _OPTION_TYPES or name in _SPELLINGS or name in _UNSUPPORTED:
            options.add(name, value, "the request's parameters")
        elif name not in _FOREIGN_PARAMETERS and not name.startswith(_FOREIGN_PREFIXES):
            raise _unknown(name, value, "unknown request parameter", _OPTION_TYPES)
    session = _session(options, prompts)
    cancel = options.flag("cancel", False)
    if cancel:
        _check_cancel(session, prompts, request_id)
    if len(prompts) != 1 and not (cancel or (session and _is_order(session) and not prompts)):
        raise InvalidRequestError("prompt", prompts, f"send exactly one of {', '.join(PROMPT_FIELDS)}")
    field = prompts[0] if prompts else None
    prompt: Any = _values(field, tensors[field]) if field else None
    # A tokenizer that adds bos would make a prompt of nothing.
    if field == "text_input" and not prompt:
        raise InvalidRequestError("text_input", prompt, "is empty: send at least one character")
    given = {name: str(_values(name, tensors[name])) for name in TEMPLATE_FIELDS if name in tensors}
    if given and field != "messages":
        raise InvalidRequestError(*given.popitem(), "goes with messages")
    params = options.sampling_params()
    if session is not None and params.n > 1:
        raise InvalidRequestError("n", params.n, "a session goes on from one answer: must be 1")
    unwanted = _LOGPROB_OUTPUTS if params.num_logprobs is None else frozenset()
    if params.num_prompt_logprobs is None:
        unwanted |= {"prompt_logprobs"}
    unwanted -= set(requested_outputs)
    return ParsedRequest(
        text=prompt if field == "text_input" else None,
        input_ids=prompt if field == "input_ids" else None,
        messages=parse_messages(prompt) if field == "messages" else None,
        tools=parse_tools(given["tools"]) if "tools" in given else None,
        template_variables=(
            parse_template_variables(given["chat_template_kwargs"]) if "chat_template_kwargs" in given else None
        ),
        session=session,
        request_id=request_id,
        cancel=cancel,
        priority=options.number("priority") or 0,
        timeout_ms=options.timeout_ms(),
        params=params,
        stream=options.flag("stream", False),
        echo=not options.flag("exclude_input_in_output", True),
        outputs=frozenset(
            field.name
            for field in OUTPUTS
            if (not requested_outputs or field.name in requested_outputs)
            and options.flag(f"return_{field.name}", True)
            and field.name not in unwanted
        ),
    )


def _session(options: _Options, prompts: list[str]) -> SessionFields | None:
    session_id, step = options.number("session_id"), options.number("step")
    start, end, stop = (options.flag(name, False) for name in ("sequence_start", "sequence_end", "session_stop"))
    if session_id is None:
        for name, value in (("sequence_start", start), ("sequence_end", end), ("session_stop", stop)):
            if value:
                raise InvalidRequestError(name, value, "send the session_id that it is about")
        if step is not None:
            raise InvalidRequestError("step", step, "send the session_id that it is about")
        return None
    if stop and start:
        raise InvalidRequestError("session_stop", stop, "a session cannot start and stop in one request: leave one out")
    if stop and (prompts or step is not None):
        extra = [*prompts, *(["step"] if step is not None else [])]
        raise InvalidRequestError("session_stop", stop, f"goes without {', '.join(extra)}: send that as the next turn")
    if start and step:
        raise InvalidRequestError("step", step, "a session that starts has no history: leave it out")
    return SessionFields(session_id=session_id, start=start, end=end, stop=stop, step=step)


def _is_order(session: SessionFields) -> bool:
    """Whether these fields mean something without a prompt."""
    return session.stop or (session.end and not session.start and session.step is None)


def _check_cancel(session: SessionFields | None, prompts: list[str], request_id: str) -> None:
    if not request_id:
        raise InvalidRequestError("cancel", True, "give this request the id of the request to cancel")
    extra = [*prompts, *(["session_id"] if session else [])]
    if extra:
        raise InvalidRequestError("cancel", True, f"goes by the request's id alone: leave out {', '.join(extra)}")


def _values(name: str, array: np.ndarray) -> Any:
    """A tensor as plain data: a list for dims -1, one value for dims 1, strings as str."""
    field = _INPUT_BY_NAME[name]
    if array.size and array.dtype.kind not in _KINDS[field.data_type]:
        expected = f"must be of type {field.data_type.removeprefix('TYPE_')}"
        raise InvalidRequestError(name, f"values of type {array.dtype}", expected)
    values = array.reshape(-1).tolist()
    if field.data_type == "TYPE_STRING":
        try:
            values = [item.decode("utf-8") if isinstance(item, bytes) else str(item) for item in values]
        except UnicodeDecodeError as error:
            raise InvalidRequestError(name, values, f"is not UTF-8: {error.reason} at byte {error.start}") from None
    if field.dims == -1:
        return values
    if len(values) != 1:
        raise InvalidRequestError(name, f"shape {list(array.shape)}", "must hold exactly one value")
    return values[0]


def _json_options(text: str) -> dict[str, Any]:
    try:
        options = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InvalidRequestError("sampling_parameters", text, f"is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise InvalidRequestError("sampling_parameters", text, "must be a JSON object")
    for name, value in options.items():
        if _SPELLINGS.get(name, name) not in _SAMPLING_TYPES and name not in _UNSUPPORTED:
            raise _unknown(name, value, "unknown key in sampling_parameters", _SAMPLING_TYPES)
    return {name: value for name, value in options.items() if value is not None}


def _convert(name: str, value: Any) -> Any:
    """Lenient where benchmark clients are: numbers and booleans may be written as strings, one stop string as such."""
    if name == FIELD:
        return parse_response_format(value)
    if name in ("stop", "bad_words") and isinstance(value, str):
        value = [value]
    try:
        if name == "logit_bias" and isinstance(value, str):
            value = msgspec.json.decode(value)
        return msgspec.convert(value, _OPTION_TYPES[name], strict=False)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(name, value, str(error)) from None


def _timeout_ms(value: Any) -> float:
    microseconds = _convert("timeout", value)
    if not 0 <= microseconds <= MAX_TIMEOUT_MS * 1000:
        raise InvalidRequestError("timeout", value, f"must be 0 (no limit) to {MAX_TIMEOUT_MS * 1000} microseconds")
    return microseconds / 1000


def _same(one: Any, other: Any) -> bool:
    """A tensor's FP32 equals the JSON number it was rounded from."""
    if isinstance(one, float) and isinstance(other, float):
        with np.errstate(over="ignore"):
            return bool(np.float32(one) == np.float32(other))
    return bool(one == other)


def _unknown(name: str, value: Any, what: str, known: Mapping[str, Any]) -> InvalidRequestError:
    """The name is the client's own text, which may be anything: it is shown as one unless it looks like a name."""
    shown = name if name.isidentifier() and len(name) <= MAX_NAME_LENGTH else reprlib.repr(name)
    return InvalidRequestError(shown, value, f"{what}; known are {', '.join(sorted(known))}")
