"""Requests as clients send them: spellings, strings for numbers, contradictions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.backend.conftest import array_of
from tritonmind.errors import InvalidRequestError
from tritonmind.request_fields import OUTPUTS, ParsedRequest, parse_request
from tritonmind.sampling_params import SamplingParams


def parsed(parameters: dict[str, Any] | None = None, outputs: list[str] | None = None, **tensors: Any) -> ParsedRequest:
    arrays = {name: array_of(value) for name, value in {"text_input": "a", **tensors}.items()}
    return parse_request(arrays, parameters or {}, outputs or [])


def test_defaults() -> None:
    request = parsed()
    assert request == ParsedRequest(text="a")
    assert (request.stream, request.echo, request.params) == (False, False, SamplingParams())
    assert request.outputs == {field.name for field in OUTPUTS}


def test_numbers_written_as_strings() -> None:
    """As genai-perf sends them."""
    text = json.dumps({"max_tokens": "128", "temperature": "0.5", "ignore_eos": "true", "stop": "x", "top_k": 3.0})
    assert parsed(sampling_parameters=text).params == SamplingParams(
        max_tokens=128, temperature=0.5, ignore_eos=True, stop=("x",), top_k=3
    )


def test_every_source_gives_the_same_parameters() -> None:
    expected = SamplingParams(max_tokens=5, seed=2**64 - 1, stop=("b", "c"), stop_token_ids=(7,))
    options = {"max_tokens": 5, "seed": 2**64 - 1, "stop": ["b", "c"], "stop_token_ids": [7]}
    as_tensors = {
        "max_tokens": np.array([[5]], dtype=np.int32),
        "seed": np.array([2**64 - 1], dtype=np.uint64),
        "stop_words": ["b", "c"],
        "stop_token_ids": np.array([7], dtype=np.int32),
    }
    assert parsed(**as_tensors).params == expected
    assert parsed(sampling_parameters=json.dumps(options)).params == expected
    assert parsed({"sampling_parameters": json.dumps(options)}).params == expected
    assert parsed(options).params == expected


@pytest.mark.parametrize("name", ["stream", "streaming"])
def test_both_spellings_of_stream(name: str) -> None:
    assert parsed(**{name: True}).stream
    assert parsed({name: True}).stream
    assert not parsed(**{name: False}).stream


def test_agreeing_twice_is_fine_and_fp32_agrees_with_its_decimal() -> None:
    request = parsed(
        stream=True,
        streaming=True,
        temperature=np.array([0.7], dtype=np.float32),
        sampling_parameters='{"temperature": 0.7}',
    )
    assert request.stream
    assert request.params.temperature == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"stream": True, "streaming": False}, "stream.*contradicts"),
        ({"stop": ["a"], "stop_words": ["b"]}, "stop.*contradicts"),
        ({"max_tokens": np.array([5], dtype=np.int32), "sampling_parameters": '{"max_tokens": 6}'}, "max_tokens=6"),
        ({"sampling_parameters": '{"max_tokens": 6}', "parameters": {"max_tokens": 7}}, "max_tokens=7"),
    ],
)
def test_contradictions_are_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        parsed(**given)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temprature": 1}, "temprature=1.*known are.*temperature"),
        ({"max_tokens": "many"}, "max_tokens='many'"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"temperature": True}, "temperature=True"),
        ({"stop": [1]}, "stop="),
        ({"stop_token_ids": ["x"]}, "stop_token_ids="),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        parsed(sampling_parameters=json.dumps(options))


@pytest.mark.parametrize("text", ["[]", "1", "{", '{"temperature": NaN}'])
def test_sampling_parameters_must_be_a_json_object(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="sampling_parameters"):
        parsed(sampling_parameters=text)


@pytest.mark.parametrize("depth", [10, 300, 600, 900, 100_000])
def test_nesting_at_any_depth_is_an_invalid_request(depth: int) -> None:
    """Some depths can be decoded, but not shown in an error's message."""
    nested = "[" * depth + "]" * depth
    for text in ("[" * depth, nested, f'{{"stop": {nested}}}', f'{{"unknown": {nested}}}'):
        with pytest.raises(InvalidRequestError, match=r"^(sampling_parameters|stop|unknown)="):
            parsed(sampling_parameters=text)
        with pytest.raises(InvalidRequestError, match=r"^(sampling_parameters|stop|unknown)="):
            parsed({"sampling_parameters": text})


def test_empty_text_is_refused_whatever_the_tokenizer_adds() -> None:
    with pytest.raises(InvalidRequestError, match="text_input='' is invalid: is empty"):
        parsed(text_input="")


def test_the_server_s_own_parameters_are_left_alone() -> None:
    request = parsed({"id": "1", "triton_enable_empty_final_response": True})
    assert request == ParsedRequest(text="a")
    with pytest.raises(InvalidRequestError, match="max_token=5"):
        parsed({"max_token": 5})


def test_outputs_follow_request_and_flags() -> None:
    assert parsed(outputs=["text_output", "token_ids"]).outputs == {"text_output", "token_ids"}
    assert "token_ids" not in parsed(return_token_ids=False).outputs
    assert "finish_reason" in parsed(return_finish_reason=True).outputs


def test_null_in_json_is_left_out() -> None:
    assert parsed(sampling_parameters='{"seed": null}').params == SamplingParams()
