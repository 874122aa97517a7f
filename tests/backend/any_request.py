"""Requests of every kind, drawn from the table of the interface: right ones, odd ones and absurd ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.backend.conftest import VOCAB, array_of
from tritonmind.request_fields import INPUTS, OUTPUTS, PROMPT_FIELDS, TensorField
from tritonmind.sampling_params import SamplingParams

SESSION_IDS = range(3)
BY_NAME = {field.name: field for field in INPUTS}
DTYPES: dict[str, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_BOOL": np.bool_,
    "TYPE_INT32": np.int32,
    "TYPE_UINT32": np.uint32,
    "TYPE_UINT64": np.uint64,
    "TYPE_FP32": np.float32,
}
JSON_KEYS = (*(name for name in SamplingParams.__struct_fields__ if name != "guided"), "response_format")
UNSUPPORTED_KEYS = ("best_of", "use_beam_search", "beam_width")  # no tensor has their name
# These stand for something else than an option of an answer, or are refused whatever they say: drawn apart.
_APART = {
    *PROMPT_FIELDS, "sampling_parameters", "session_id", "sequence_start", "sequence_end", "session_stop", "step",
    "cancel", "image", "lora_name", "guided_decoding_guide_type", "guided_decoding_guide", "embedding_request",
}  # fmt: skip
OPTIONS = [name for name in BY_NAME if name not in _APART]

_texts = st.text(min_size=1, max_size=8)
_USUAL: dict[str, st.SearchStrategy[Any]] = {
    "TYPE_STRING": _texts,
    "TYPE_BOOL": st.booleans(),
    "TYPE_INT32": st.integers(0, 6),
    "TYPE_UINT32": st.integers(0, 6),
    "TYPE_UINT64": st.integers(0, 6),
    "TYPE_FP32": st.floats(2**-6, 1, width=32),
}
# Where the usual value of a type will not do, or would take long.
_RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "text_input": st.text(min_size=1, max_size=12),
    "input_ids": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": _texts}),
        min_size=1,
        max_size=3,
    ).map(json.dumps),
    "session_id": st.sampled_from(SESSION_IDS),
    "step": st.integers(0, 30),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(6, 8),
    "timeout_ms": st.sampled_from([0, 20_000, 1]),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1).map(str), st.floats(-100, 100), max_size=4).map(json.dumps),
    "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=4),
    "response_format": st.sampled_from(
        ['{"type": "text"}', '{"type": "json_object"}', '{"type": "regex", "regex": "[ab]{1,3}"}']
    ),
}

_HUGE_TEXT = "x" * 300_000
_ODD_TEXTS = [
    "", " ", "\0", "{", "null", "[]", "{}", "NaN", "1e999", "true", '"\\ud800"', _HUGE_TEXT, "[" * 50_000,
    '{"a":' * 50_000, "[" * 500 + "]" * 500, '[{"role": "user"}]', '[{"role": "user", "content": "\\ud800"}]',
    '[{"role": "user", "content": "a", "name": "b"}]', '[{"role": 1, "content": []}]', json.dumps({_HUGE_TEXT: 1}),
    '{"stop": ' + "[" * 300 + "]" * 300 + "}", '{"top_k": 1e400, "top_p": NaN}', '{"max_tokens": 9, "max_tokens": 8}',
    '{"seed": -1}', '{"min_tokens": 1e18}', f'{{"max_tokens": {10**40}}}', f'{{"top_k": {10**40}}}',
    f'{{"min_tokens": {2**70}}}', '{"temperature": 1e-300}', '{"temperature": 1e300}', '{"repetition_penalty": 1e300}',
    '{"repetition_penalty": 1e-300}', '{"logit_bias": {"1": 1e999}}', '{"logit_bias": {"-1": 1}}', '{"1": 101}',
    '{"type": "regex", "regex": "("}', '{"type": "json_schema", "json_schema": {"schema": {"minimum": "a"}}}',
    '{"stop": "\\ud83d"}', '{"bad_words": ["\\udc00"]}', '{"prompt_logprobs": 3}', '{"best_of": 2}',
    json.dumps({"stop": ["x"] * 5000}), json.dumps({"bad_words": [_HUGE_TEXT]}),
    json.dumps({"logit_bias": {str(number): 1 for number in range(5000)}}), '{"n": 128, "max_tokens": 60}',
]  # fmt: skip
_ODD_BYTES = [b"\xff\xfe", b"\xed\xa0\x80", b'{"stop": "\xff"}', b"\xf0\x9f", b"a" * 70_000 + b"\x80"]
_ODD_NUMBERS: dict[Any, list[Any]] = {
    np.bool_: [True, False],
    np.int32: [-1, 0, 1, -(2**31), 2**31 - 1, 128, 1000],
    np.uint32: [0, 2**32 - 1],
    np.uint64: [0, 2**63, 2**64 - 1, 7],
    np.float32: [float("nan"), float("inf"), float("-inf"), -0.0, -1, 0, 1e-45, 1e-30, 3e38, 2, 1.0000001, 101],
    np.int64: [-(2**63), 2**63 - 1, 2**40, 1],
    np.float64: [float("nan"), 1e300, 1.5, 2.0, float("inf")],
    np.complex128: [1j],
}
_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_odd_json = st.dictionaries(
    st.sampled_from(
        [*JSON_KEYS, "logprobs", "structured_outputs", "include_stop_str_in_output", "stream", *UNSUPPORTED_KEYS]
    )
    | st.text(max_size=4),
    _json_values,
    max_size=3,
).map(json.dumps)


@dataclass
class DrawnRequest:
    """What a client sends, and whether it gives up at once."""

    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    request_id: str = ""
    timeout: int = 0
    gives_up: bool = False


def right(name: str) -> st.SearchStrategy[Any]:
    """A value, or list of values, that the field may have in a request that is answered."""
    field = BY_NAME[name]
    usual = _USUAL[field.data_type]
    return _RIGHT.get(name, usual if field.dims == 1 else st.lists(usual, max_size=3))


def _array(field: TensorField, value: Any) -> np.ndarray:
    array = array_of(value)
    return array if array.dtype == np.object_ else array.astype(DTYPES[field.data_type])


def _odd_scalars(dtype: Any) -> st.SearchStrategy[np.ndarray]:
    if dtype is np.object_:
        texts = st.sampled_from(_ODD_TEXTS).map(str.encode) | st.sampled_from(_ODD_BYTES)
        return (texts | _odd_json.map(str.encode)).map(lambda text: np.array([text], dtype=np.object_))
    return st.sampled_from(_ODD_NUMBERS[dtype]).map(lambda number: np.array([number], dtype=dtype))


@st.composite
def _odd_arrays(draw: st.DrawFn, field: TensorField) -> np.ndarray:
    """A tensor that a field has no business with, mostly: a value at the limits, a wrong type or a wrong shape."""
    kind = draw(st.sampled_from(["limit", "limit", "type", "shape"]))
    if kind == "limit":
        return draw(_odd_scalars(DTYPES[field.data_type]))
    if kind == "type":
        others = [dtype for dtype in [np.object_, *_ODD_NUMBERS] if dtype is not DTYPES[field.data_type]]
        return draw(_odd_scalars(draw(st.sampled_from(others))))
    values = _array(field, draw(right(field.name).filter(lambda value: value != [])))
    return np.resize(values, draw(st.sampled_from([(0,), (2,), (1, 1), (2, 0), (1, 3000), ()])))


@st.composite
def _spelled(draw: st.DrawFn, request: DrawnRequest, options: dict[str, Any], name: str) -> None:
    """Give an option in one spelling or in two, which agree or not."""
    value = draw(right(name))
    scalar = BY_NAME[name].dims == 1
    places = ["tensor", *(["parameter"] if scalar else []), *(["json"] if name in JSON_KEYS else [])]
    first = draw(st.sampled_from(places))
    twice = draw(st.integers(0, 11)) == 0
    for place in [first, draw(st.sampled_from(places))] if twice else [first]:
        if place == "tensor":
            request.inputs[name] = _array(BY_NAME[name], value)
        elif place == "json":
            options[name] = value
        else:
            request.parameters[name] = draw(st.sampled_from([value, str(value)]))
        if draw(st.booleans()):
            value = draw(right(name))


@st.composite
def _orders(draw: st.DrawFn, request: DrawnRequest) -> None:
    """An order to cancel a request, or to stop or forget a session."""
    kind = draw(st.sampled_from(["cancel", "session_stop", "sequence_end"]))
    request.inputs[kind] = np.array([True])
    if kind == "cancel":
        request.request_id = draw(st.sampled_from(["a", "b", "unknown", ""]))
    else:
        request.inputs["session_id"] = np.array([draw(right("session_id"))], dtype=np.uint64)
        if draw(st.booleans()):
            request.inputs["sequence_end"] = np.array([True])


@st.composite
def _make_odd(draw: st.DrawFn, request: DrawnRequest) -> None:
    if draw(st.integers(0, 3)):
        name = draw(st.sampled_from([*BY_NAME, *["sampling_parameters"] * 9, *PROMPT_FIELDS]))
        request.inputs[name] = draw(_odd_arrays(BY_NAME[name]))
    else:
        name = draw(st.sampled_from([*BY_NAME, *JSON_KEYS, "timeout", "x-y", *UNSUPPORTED_KEYS]) | st.text(max_size=5))
        scalars = st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5)
        request.parameters[name] = draw(scalars | st.sampled_from(_ODD_TEXTS) | _odd_json)


@st.composite
def requests(draw: st.DrawFn) -> DrawnRequest:
    """Half of them have nothing odd, and most of those are answered."""
    request = DrawnRequest(request_id=draw(st.sampled_from(["", "a", "b"])))
    kind = draw(st.sampled_from(["plain"] * 6 + ["session"] * 4 + ["order"]))
    if kind == "order":
        draw(_orders(request))
    else:
        num_prompts = draw(st.sampled_from([1] * 20 + [0, 2]))
        for name in draw(st.permutations(PROMPT_FIELDS))[:num_prompts]:
            request.inputs[name] = _array(BY_NAME[name], draw(right(name)))
        options: dict[str, Any] = {}
        names = draw(st.lists(st.sampled_from(OPTIONS), unique=True, max_size=5))
        if draw(st.integers(0, 9)) and "max_tokens" not in names:
            names.append("max_tokens")
        for name in names:
            draw(_spelled(request, options, name))
        if kind == "session":
            request.inputs["session_id"] = np.array([draw(right("session_id"))], dtype=np.uint64)
            request.inputs["sequence_start"] = np.array([draw(st.sampled_from([True, True, False]))])
            for name in draw(st.sampled_from([[]] * 4 + [["step"], ["sequence_end"]])):
                request.inputs[name] = _array(BY_NAME[name], draw(right(name)))
        if options:
            request.inputs["sampling_parameters"] = array_of(json.dumps(options))
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2]))):
        draw(_make_odd(request))
    request.outputs = draw(st.just([]) | st.lists(st.sampled_from([out.name for out in OUTPUTS]), unique=True))
    request.timeout = draw(st.sampled_from([0] * 8 + [1, 1000, 10**7]))
    request.gives_up = draw(st.sampled_from([False] * 9 + [True]))
    return request
