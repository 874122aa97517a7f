"""The request as a Triton client sends it: which fields there are, and how they become one validated object.

A sampling option may come as a tensor, inside the JSON of `sampling_parameters`, or as a request parameter. Given
more than once, the values must agree.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from tritonmind.chat_template import Message, parse_messages
from tritonmind.errors import InvalidRequestError
from tritonmind.sampling_params import SamplingParams

TritonType = Literal["TYPE_STRING", "TYPE_BOOL", "TYPE_INT32", "TYPE_UINT32", "TYPE_UINT64", "TYPE_FP32"]


class TensorField(NamedTuple):
    """A tensor of the model's interface. dims: 1 is one value, -1 any number."""

    name: str
    data_type: TritonType
    dims: int


PROMPT_FIELDS = ("text_input", "input_ids", "messages")

INPUTS = (
    TensorField("text_input", "TYPE_STRING", 1),
    TensorField("input_ids", "TYPE_INT32", -1),
    TensorField("messages", "TYPE_STRING", 1),
    TensorField("stream", "TYPE_BOOL", 1),
    TensorField("streaming", "TYPE_BOOL", 1),
    TensorField("exclude_input_in_output", "TYPE_BOOL", 1),
    TensorField("sampling_parameters", "TYPE_STRING", 1),
    TensorField("max_tokens", "TYPE_INT32", 1),
    TensorField("temperature", "TYPE_FP32", 1),
    TensorField("top_k", "TYPE_INT32", 1),
    TensorField("top_p", "TYPE_FP32", 1),
    TensorField("min_p", "TYPE_FP32", 1),
    TensorField("repetition_penalty", "TYPE_FP32", 1),
    TensorField("presence_penalty", "TYPE_FP32", 1),
    TensorField("frequency_penalty", "TYPE_FP32", 1),
    TensorField("seed", "TYPE_UINT64", 1),
    TensorField("stop", "TYPE_STRING", -1),
    TensorField("stop_words", "TYPE_STRING", -1),
    TensorField("stop_token_ids", "TYPE_INT32", -1),
    TensorField("ignore_eos", "TYPE_BOOL", 1),
    TensorField("return_token_ids", "TYPE_BOOL", 1),
    TensorField("return_finish_reason", "TYPE_BOOL", 1),
    TensorField("return_num_input_tokens", "TYPE_BOOL", 1),
    TensorField("return_num_output_tokens", "TYPE_BOOL", 1),
)

OUTPUTS = (
    TensorField("text_output", "TYPE_STRING", -1),
    TensorField("token_ids", "TYPE_INT32", -1),
    TensorField("finish_reason", "TYPE_STRING", -1),
    TensorField("stop_reason", "TYPE_STRING", -1),
    TensorField("num_input_tokens", "TYPE_UINT32", 1),
    TensorField("num_output_tokens", "TYPE_UINT32", -1),
    TensorField("num_cached_tokens", "TYPE_UINT32", 1),
)

_INPUT_BY_NAME = {field.name: field for field in INPUTS}
_SPELLINGS = {"streaming": "stream", "stop_words": "stop"}
_SAMPLING_TYPES: dict[str, Any] = typing.get_type_hints(SamplingParams)
_FLAG_TYPES: dict[str, Any] = {field.name: bool for field in INPUTS if field.data_type == "TYPE_BOOL"}
_OPTION_TYPES = _FLAG_TYPES | _SAMPLING_TYPES
# What the server and its clients put among the parameters for their own use.
_FOREIGN_PARAMETERS = frozenset({"id", "timeout", "priority"})
_FOREIGN_PREFIXES = ("triton_", "sequence_", "x-")


@dataclass(frozen=True, kw_only=True)
class ParsedRequest:
    """A request whose fields are checked. Exactly one of text, input_ids and messages is set.

    echo: the answer starts with the prompt's text. outputs: names of the tensors the client wants.
    """

    text: str | None = None
    input_ids: list[int] | None = None
    messages: list[Message] | None = None
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    stream: bool = False
    echo: bool = False
    outputs: frozenset[str] = frozenset(field.name for field in OUTPUTS)


class _Options:
    """Options by name, each with where its value came from; a second, different value is an error."""

    def __init__(self) -> None:
        self._given: dict[str, tuple[str, Any]] = {}

    def add(self, name: str, value: Any, source: str) -> None:
        canonical = _SPELLINGS.get(name, name)
        value = _convert(canonical, value)
        if canonical in self._given:
            other_source, other = self._given[canonical]
            if not _same(value, other):
                raise InvalidRequestError(name, value, f"{source} contradicts {other_source}, which says {other!r}")
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

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(**{n: value for n, (_, value) in self._given.items() if n in _SAMPLING_TYPES})


def parse_request(
    tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any], requested_outputs: list[str]
) -> ParsedRequest:
    """Check everything about a request that needs neither the model nor the tokenizer.

    tensors: the inputs that were sent, any shape with the right number of values (a leading batch dimension of 1 is
    fine). parameters: the request's own, read last. requested_outputs: empty means all. Raises InvalidRequestError.
    """
    prompts = [name for name in PROMPT_FIELDS if name in tensors]
    if len(prompts) != 1:
        raise InvalidRequestError("prompt", prompts, f"send exactly one of {', '.join(PROMPT_FIELDS)}")
    options = _Options()
    for name, array in tensors.items():
        if name not in PROMPT_FIELDS and name != "sampling_parameters":
            options.add(name, _values(name, array), f"the input {name}")
    if "sampling_parameters" in tensors:
        options.add_json(_values("sampling_parameters", tensors["sampling_parameters"]), "sampling_parameters")
    for name, value in parameters.items():
        if name == "sampling_parameters":
            options.add_json(str(value), "sampling_parameters among the request's parameters")
        elif name in _OPTION_TYPES or name in _SPELLINGS:
            options.add(name, value, "the request's parameters")
        elif name not in _FOREIGN_PARAMETERS and not name.startswith(_FOREIGN_PREFIXES):
            raise InvalidRequestError(name, value, f"unknown request parameter; known are {_known(_OPTION_TYPES)}")
    prompt = _values(prompts[0], tensors[prompts[0]])
    # A tokenizer that adds bos would make a prompt of nothing.
    if prompts[0] == "text_input" and not prompt:
        raise InvalidRequestError("text_input", prompt, "is empty: send at least one character")
    return ParsedRequest(
        text=prompt if prompts[0] == "text_input" else None,
        input_ids=prompt if prompts[0] == "input_ids" else None,
        messages=parse_messages(prompt) if prompts[0] == "messages" else None,
        params=options.sampling_params(),
        stream=options.flag("stream", False),
        echo=not options.flag("exclude_input_in_output", True),
        outputs=frozenset(
            field.name
            for field in OUTPUTS
            if (not requested_outputs or field.name in requested_outputs) and options.flag(f"return_{field.name}", True)
        ),
    )


def _values(name: str, array: np.ndarray) -> Any:
    """A tensor as plain data: a list for dims -1, one value for dims 1, strings as str."""
    field = _INPUT_BY_NAME[name]
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
        if _SPELLINGS.get(name, name) not in _SAMPLING_TYPES:
            expected = f"unknown key in sampling_parameters; known are {_known(_SAMPLING_TYPES)}"
            raise InvalidRequestError(name, value, expected)
    return {name: value for name, value in options.items() if value is not None}


def _convert(name: str, value: Any) -> Any:
    """Lenient where benchmark clients are: numbers and booleans may be written as strings, one stop string as such."""
    if name == "stop" and isinstance(value, str):
        value = [value]
    try:
        return msgspec.convert(value, _OPTION_TYPES[name], strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(name, value, str(error)) from None


def _same(one: Any, other: Any) -> bool:
    """A tensor's FP32 equals the JSON number it was rounded from."""
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.float32(one) == np.float32(other))
    return bool(one == other)


def _known(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))
