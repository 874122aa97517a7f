"""Sampling options as they are typed: each field of SamplingParams has one, and SamplingParams judges it."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from tritonmind.errors import InvalidRequestError
from tritonmind.sampling_params import SamplingParams
from tritonmind_tools.console_options import OPTIONS, add_sampling_arguments, parse_option, sampling_options


def parsed(line: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    return sampling_options(parser.parse_args(line.split()))


def test_every_field_has_an_option_unless_nothing_of_it_would_show() -> None:
    assert set(OPTIONS) | {"n", "num_logprobs", "num_prompt_logprobs", "guided"} == set(
        SamplingParams.__struct_fields__
    )


def test_command_line() -> None:
    assert parsed("") == {}
    numbers = "--max-tokens 5 --temperature 0 --top-p 0.5 --top-k 3 --seed 9"
    assert parsed(f"{numbers} --stop a --stop b --stop-token-ids 7 --ignore-eos --no-skip-special-tokens") == {
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 9,
        "stop": ("a", "b"),
        "stop_token_ids": (7,),
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    assert parsed('--logit-bias {"5":-100} --bad-words [x]') == {"logit_bias": {5: -100.0}, "bad_words": ("[x]",)}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--max-tokens 0", "max_tokens=0 is invalid"),
        ("--temperature hot", "temperature='hot' is invalid: must be a number"),
        ("--top-p 0", "top_p=0.0 is invalid"),
        ("--stop-token-ids x", r"stop_token_ids=\['x'\] is invalid: each must be a whole number"),
        ("--logit-bias 5", "logit_bias=5 is invalid: must be a JSON object"),
        ("--seed -1", "seed=-1 is invalid"),
    ],
)
def test_wrong_value_on_the_command_line_is_named(line: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{problem}"):
        parsed(line)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0", 0.0),
        ("seed", "18446744073709551615", 2**64 - 1),
        ("ignore_eos", "false", False),
        ("stop", "END", ("END",)),
        ("stop", '"\\n"', ("\n",)),
        ("stop", '["a b", "c"]', ("a b", "c")),
        ("stop", "[INST]", ("[INST]",)),
        ("logit_bias", '{"7": 1.5}', {7: 1.5}),
        ("stop_token_ids", "5", (5,)),
        ("stop_token_ids", "[5, 6]", (5, 6)),
    ],
)
def test_values_after_set(name: str, text: str, value: object) -> None:
    assert parse_option(name, text) == value
