"""Requests as clients send them: spellings, strings for numbers, contradictions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backend.conftest import array_of
from tritonmind.errors import InvalidRequestError
from tritonmind.messages import GuidedDecoding
from tritonmind.request_fields import OUTPUTS, ParsedRequest, SessionFields, parse_request
from tritonmind.sampling_params import SamplingParams


def parsed(parameters: dict[str, Any] | None = None, outputs: list[str] | None = None, **tensors: Any) -> ParsedRequest:
    arrays = {name: array_of(value) for name, value in {"text_input": "a", **tensors}.items()}
    return parse_request(arrays, parameters or {}, outputs or [])


def test_defaults() -> None:
    request = parsed()
    assert request == ParsedRequest(text="a")
    assert (request.stream, request.echo, request.params) == (False, False, SamplingParams())
    assert request.outputs == {field.name for field in OUTPUTS} - {"logprobs", "cumulative_logprob", "prompt_logprobs"}


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


@pytest.mark.parametrize("name", ["", "\n", "a=b", "\ud800", "x" * 10_000])
def test_a_name_that_is_none_is_shown_as_a_text(name: str) -> None:
    for source in ({"parameters": {name: 1}}, {"sampling_parameters": json.dumps({name: 1})}):
        with pytest.raises(InvalidRequestError) as refusal:
            parsed(**source)
        message = str(refusal.value)
        assert message.isprintable() and len(message) < 1500
        assert message.startswith(("'", "sampling_parameters="))


def test_a_contradiction_shows_little_of_a_long_value() -> None:
    long = {"stop": ["x" * 1000] * 60}
    with pytest.raises(InvalidRequestError, match=r"stop=.* contradicts the input stop") as refusal:
        parsed(**long, sampling_parameters=json.dumps({"stop": ["y"]}))
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("text_input", np.array([1.5])),
        ("input_ids", np.array([1.0, 2.5])),
        ("input_ids", np.array([b"a"], dtype=np.object_)),
        ("max_tokens", np.array([5.0], dtype=np.float32)),
        ("stream", np.array([1])),
        ("temperature", np.array([b"1"], dtype=np.object_)),
        ("step", np.array([1j])),
    ],
)
def test_a_tensor_of_another_type_is_named(name: str, array: np.ndarray) -> None:
    tensors = {name: array} if name in ("text_input", "input_ids") else {"text_input": array_of("a"), name: array}
    with pytest.raises(InvalidRequestError, match=f"{name}='values of type {array.dtype}' is invalid: must be of type"):
        parse_request(tensors, {}, [])


@pytest.mark.parametrize("value", [-1, 2**63, "1" * 400])
def test_a_timeout_beyond_any_is_named(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^timeout="):
        parsed({"timeout": value})


@pytest.mark.parametrize("name", ["max_tokens", "seed", "timeout", "temperature"])
def test_a_number_of_thousands_of_digits_is_an_invalid_request(name: str) -> None:
    digits = "1" * 5000
    for parameters in ({name: digits}, {"sampling_parameters": f'{{"{name}": {digits}}}'}):
        with pytest.raises(InvalidRequestError):
            parsed(parameters)


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


def test_every_sampling_option_has_a_tensor_and_reaches_the_parameters() -> None:
    tensors: dict[str, Any] = {
        "n": np.array([2], dtype=np.int32),
        "max_tokens": np.array([9], dtype=np.int32),
        "min_length": np.array([2], dtype=np.int32),
        "temperature": np.array([0.5], dtype=np.float32),
        "top_k": np.array([4], dtype=np.int32),
        "top_p": np.array([0.5], dtype=np.float32),
        "min_p": np.array([0.25], dtype=np.float32),
        "repetition_penalty": np.array([1.5], dtype=np.float32),
        "presence_penalty": np.array([0.5], dtype=np.float32),
        "frequency_penalty": np.array([-0.5], dtype=np.float32),
        "logit_bias": '{"17": 2.5, "3": -100}',
        "bad_words": ["a", "b c"],
        "seed": np.array([7], dtype=np.uint64),
        "stop": ["x"],
        "include_stop": True,
        "stop_token_ids": np.array([1], dtype=np.int32),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "num_logprobs": np.array([3], dtype=np.int32),
        "num_prompt_logprobs": np.array([1], dtype=np.int32),
        "response_format": '{"type": "text"}',
    }
    expected = {
        "n": 2, "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 4, "top_p": 0.5, "min_p": 0.25,
        "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "logit_bias": {17: 2.5, 3: -100.0}, "bad_words": ("a", "b c"), "seed": 7, "stop": ("x",),
        "include_stop": True, "stop_token_ids": (1,), "ignore_eos": True, "skip_special_tokens": False,
        "num_logprobs": 3, "num_prompt_logprobs": 1, "guided": None,
    }  # fmt: skip
    assert expected.keys() == set(SamplingParams.__struct_fields__), "an option without a tensor in this test"
    assert parsed(**tensors).params == SamplingParams(**expected)
    as_json = {**expected, "logprobs": expected["num_logprobs"], "include_stop_str_in_output": True}
    del as_json["num_logprobs"], as_json["include_stop"], as_json["guided"]
    assert parsed(sampling_parameters=json.dumps(as_json)).params == SamplingParams(**expected)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1}', '{"1": "x"}', "[" * 100_000, '{"1": null}', "\ud800"])
def test_a_bad_logit_bias_is_named(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        parsed({"logit_bias": text})


def test_response_format_is_text_or_json_and_called_guided_within() -> None:
    form = {"type": "regex", "regex": "a+"}
    guided = GuidedDecoding("regex", "a+")
    assert parsed(response_format=json.dumps(form)).params.guided == guided
    assert parsed({"response_format": json.dumps(form)}).params.guided == guided
    for value in (form, json.dumps(form)):
        assert parsed(sampling_parameters=json.dumps({"response_format": value})).params.guided == guided
    with pytest.raises(InvalidRequestError, match=r"response_format=.*contradicts"):
        parsed({"response_format": json.dumps(form)}, response_format='{"type": "json_object"}')
    with pytest.raises(InvalidRequestError, match=r"guided=.*unknown key"):
        parsed(sampling_parameters=json.dumps({"guided": form}))
    with pytest.raises(InvalidRequestError, match=r"response_format=.*`regex`"):
        parsed(response_format='{"type": "regex"}')


def test_what_the_servers_openai_front_end_sends_for_tools() -> None:
    """For backends of vLLM and of TensorRT-LLM, as its version 26.04 does."""
    schema = '{"type": "object", "properties": {}}'
    expected = GuidedDecoding("json_schema", '{"type":"object","properties":{}}')
    rest = {"regex": None, "choice": None, "grammar": None, "json_object": None, "disable_fallback": False}
    for value in (schema, json.loads(schema)):
        text = json.dumps({"json": value, **rest, "whitespace_pattern": None})
        assert parsed(sampling_parameters=json.dumps({"structured_outputs": text})).params.guided == expected
    guide = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": schema}
    assert parsed(**guide).params.guided == expected
    assert parsed(guided_decoding_guide_type="json").params.guided == GuidedDecoding("json_schema", "{}")
    choice = {"structured_outputs": {"choice": ["a+", "b"]}}
    assert parsed(sampling_parameters=json.dumps(choice)).params.guided == GuidedDecoding("regex", r"a\+|b")
    with pytest.raises(InvalidRequestError, match=r"guided_decoding_guide_type=.*goes without"):
        parsed(**guide, response_format='{"type": "json_object"}')
    for kind, said in (("json_schema", "missing"), ("ebnf_grammar", "missing"), ("structural_tag", "missing")):
        with pytest.raises(InvalidRequestError, match=said):
            parsed(guided_decoding_guide_type=kind)
    with pytest.raises(InvalidRequestError, match="must be json"):
        parsed(guided_decoding_guide_type="ebnf_grammar", guided_decoding_guide="root ::= [0-9]+")
    for wrong in ({}, {"regex": "a", "json_object": True}, {"grammar": "x"}, {"json": "{"}, {"jason": "{}"}, [1]):
        with pytest.raises(InvalidRequestError, match="structured_outputs="):
            parsed(sampling_parameters=json.dumps({"structured_outputs": wrong}))


@pytest.mark.parametrize("name", ["image", "lora_name", "embedding_request"])
def test_what_this_backend_cannot_do_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name}=.*leave it out"):
        parsed(**{name: "x"})


@pytest.mark.parametrize("name", ["lora_name", "best_of"])
def test_it_is_refused_in_json_too(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name}=.*leave it out"):
        parsed(sampling_parameters=json.dumps({name: 2}))
    with pytest.raises(InvalidRequestError, match=f"{name}=.*leave it out"):
        parsed({name: 2})


def test_logprobs_come_when_they_are_asked_for() -> None:
    both = {"logprobs", "cumulative_logprob"}
    assert not both & parsed().outputs
    assert both <= parsed(num_logprobs=np.array([0], dtype=np.int32)).outputs
    request = parsed(return_logprobs=True)
    assert both <= request.outputs and request.params.num_logprobs == 0
    assert parsed(outputs=["logprobs"]).outputs == {"logprobs"}
    assert both & parsed({"num_logprobs": 2, "return_logprobs": False}).outputs == {"cumulative_logprob"}


def test_session_fields_from_tensors_and_parameters() -> None:
    expected = SessionFields(session_id=2**64 - 1, end=True, step=7)
    tensors = {"session_id": np.array([[2**64 - 1]], dtype=np.uint64), "step": np.array([7], dtype=np.int32)}
    assert parsed(**tensors, sequence_end=True).session == expected
    assert parsed({"session_id": str(2**64 - 1), "step": "7", "sequence_end": "true"}).session == expected
    assert parsed().session is None
    order = parse_request({"session_stop": array_of(True)}, {"session_id": 1}, [])
    assert order.is_order and order.session == SessionFields(session_id=1, stop=True)
    order = parse_request({"cancel": array_of(True)}, {}, [], request_id="x")
    assert order.is_order and order.cancel and order.request_id == "x"


def test_limits_and_the_server_s_own_spellings_of_them() -> None:
    request = parsed({"timeout": 1500, "priority": "4"})
    assert (request.timeout_ms, request.priority) == (1.5, 4)
    assert parsed({"timeout": 2000}, timeout_ms=np.array([2], dtype=np.int32)).timeout_ms == 2
    with pytest.raises(InvalidRequestError, match=r"timeout_ms=2147483648.0 is invalid: must be 0 .* to 2147483647"):
        parsed({"timeout_ms": 2**31})
    assert parsed({"timeout": 0}, timeout_ms=np.array([0], dtype=np.int32)).timeout_ms is None


VALUES: dict[str, list[Any]] = {
    "text_input": ["a", ["a", "b"], np.array([b"\xff"], dtype=np.object_)],
    "input_ids": [np.array([1, 2], dtype=np.int32)],
    "session_id": [np.array([0], dtype=np.uint64), np.array([1, 2], dtype=np.uint64)],
    "sequence_start": [True, False],
    "sequence_end": [True, False],
    "session_stop": [True, False],
    "cancel": [True, False],
    "step": [np.array([value], dtype=np.int32) for value in (-1, 0, 5)],
    "priority": [np.array([value], dtype=np.int32) for value in (-1, 0, 5)],
    "timeout_ms": [np.array([value], dtype=np.int32) for value in (-1, 0, 5)],
}
PARAMETERS: list[Any] = [None, True, -1, 0, 5, 2**70, 1.5, "x", "7", "", float("inf"), [1], {"a": 1}]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_mix_of_fields_is_a_sound_request_or_names_its_field(data: st.DataObject) -> None:
    given_fields = data.draw(st.sets(st.sampled_from(sorted(VALUES))))
    tensors = {name: array_of(data.draw(st.sampled_from(VALUES[name]))) for name in sorted(given_fields)}
    names = [*sorted(VALUES.keys() - {"text_input", "input_ids"}), "timeout", "unknown"]
    parameters = {
        name: data.draw(st.sampled_from(PARAMETERS)) for name in data.draw(st.sets(st.sampled_from(names), max_size=2))
    }
    try:
        request = parse_request(tensors, parameters, [], request_id=data.draw(st.sampled_from(["", "x"])))
    except InvalidRequestError as error:
        assert error.field and str(error).startswith(f"{error.field}=")
        return
    assert request.is_order == ("text_input" not in tensors and "input_ids" not in tensors)
    session = request.session
    assert 0 <= request.priority < 2**31 and (request.timeout_ms is None or 0 < request.timeout_ms < 2**31)
    assert not request.cancel or (request.request_id and request.is_order and session is None)
    if session is not None:
        assert 0 <= session.session_id < 2**64 and (session.step is None or 0 <= session.step < 2**31)
        assert not (session.stop and session.start) and (not session.stop or request.is_order)
        assert not request.is_order or session.stop or session.end
    else:
        assert request.cancel or not request.is_order


def test_a_turn_of_a_session_has_one_answer() -> None:
    with pytest.raises(InvalidRequestError, match="n=2 is invalid: a session goes on from one answer"):
        parsed(session_id=np.array([1], dtype=np.uint64), sequence_start=True, n=np.array([2], dtype=np.int32))


def test_tools_and_variables_go_with_messages() -> None:
    messages = '[{"role": "user", "content": "a"}]'
    tools = '[{"type": "function", "function": {"name": "f"}}]'
    arrays = {"messages": messages, "tools": tools, "chat_template_kwargs": '{"think": false}'}
    request = parse_request({name: array_of(value) for name, value in arrays.items()}, {}, [])
    assert request.tools == [{"type": "function", "function": {"name": "f"}}]
    assert request.template_variables == {"think": False}
    with pytest.raises(InvalidRequestError, match="goes with messages"):
        parsed(tools=tools)
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs"):
        parse_request({"messages": array_of(messages), "chat_template_kwargs": array_of("[]")}, {}, [])
