"""Sampling options: ranges, the checkpoint's defaults, and what depends on the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tritonmind.errors import ConfigError, InvalidRequestError
from tritonmind.messages import EngineRequest, GuidedDecoding
from tritonmind.sampling_params import MAX_SEED, GenerationDefaults, SamplingParams, resolve

NEUTRAL = GenerationDefaults()


def resolved(params: SamplingParams, defaults: GenerationDefaults = NEUTRAL, **changes: Any) -> EngineRequest:
    facts: dict[str, Any] = {
        "request_id": 7,
        "prompt_token_ids": [3, 4, 5],
        "vocab_size": 100,
        "max_model_len": 10,
        "eos_token_ids": (2, 9),
        "encode_word": lambda word: [[ord(letter) % 100 for letter in word], [50, len(word)]],
    }
    return resolve(params, defaults, **{**facts, **changes})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1000.5),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", 1e-300),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("n", 0),
        ("n", 129),
        ("min_tokens", -1),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("bad_words", ("",)),
        ("bad_words", ("\ud800",)),
        ("stop", ("a\udc00",)),
        ("bad_words", ("x",) * 65),
        ("stop_token_ids", (1,) * 257),
        ("num_logprobs", -1),
        ("num_logprobs", 21),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("stop", ("",)),
        ("stop", ("x" * 1025,)),
        ("stop", ("x",) * 65),
        ("stop_token_ids", (-1,)),
    ],
)
def test_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name


def test_left_out_options_are_the_neutral_ones() -> None:
    request = resolved(SamplingParams())
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (1.0, 0, 1.0, 0.0)
    assert (request.repetition_penalty, request.presence_penalty, request.frequency_penalty) == (1.0, 0.0, 0.0)
    assert not request.has_penalty
    assert request.max_tokens == 7
    assert request.stop_token_ids == [2, 9]
    assert request.request_id == 7


def test_the_request_wins_over_the_checkpoint_over_neutral() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_k=40, min_p=0.1, repetition_penalty=1.2)
    request = resolved(SamplingParams(temperature=0.0, seed=5, repetition_penalty=1.5, presence_penalty=1.0), defaults)
    assert (request.min_p, request.repetition_penalty, request.presence_penalty) == (0.1, 1.5, 1.0)
    assert request.has_penalty
    assert (request.temperature, request.top_k, request.top_p, request.seed) == (0.0, 40, 1.0, 5)


@pytest.mark.parametrize(("asked", "given"), [(None, 7), (3, 3), (7, 7), (8, 7), (10**30, 7)])
def test_max_tokens_is_what_the_context_has_left(asked: int | None, given: int) -> None:
    assert resolved(SamplingParams(max_tokens=asked)).max_tokens == given


def test_prompt_must_leave_room_for_a_token() -> None:
    assert resolved(SamplingParams(), prompt_token_ids=[3] * 9).max_tokens == 1
    with pytest.raises(InvalidRequestError, match=r"10 tokens.*session_len is 10.*up to 9"):
        resolved(SamplingParams(), prompt_token_ids=[3] * 10)
    with pytest.raises(InvalidRequestError, match=r"prompt.*empty"):
        resolved(SamplingParams(), prompt_token_ids=[])


def test_ids_must_be_in_the_vocabulary() -> None:
    for ids in ([3, 100], [-1]):
        with pytest.raises(InvalidRequestError, match=r"input_ids=.*0 to 99"):
            resolved(SamplingParams(), prompt_token_ids=ids)
    with pytest.raises(InvalidRequestError, match="stop_token_ids=100"):
        resolved(SamplingParams(stop_token_ids=(100,)))


def test_stop_token_ids_join_eos_unless_it_is_ignored() -> None:
    assert resolved(SamplingParams(stop_token_ids=(50, 2))).stop_token_ids == [2, 9, 50]
    assert resolved(SamplingParams(stop_token_ids=(50,), ignore_eos=True)).stop_token_ids == [50]
    assert resolved(SamplingParams(ignore_eos=True)).stop_token_ids == []


def test_seed_is_random_unless_given() -> None:
    seeds = {resolved(SamplingParams()).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_huge_top_k_means_all() -> None:
    assert resolved(SamplingParams(top_k=2**70)).top_k == 100


def test_defaults_from_generation_config(tmp_path: Path) -> None:
    assert GenerationDefaults.from_dir(tmp_path) == NEUTRAL
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": None, "do_sample": True, "eos_token_id": [1, 2]}))
    assert GenerationDefaults.from_dir(tmp_path) == GenerationDefaults(temperature=0.6)


@pytest.mark.parametrize(
    ("content", "named"),
    [("{", "generation_config"), ("[]", "generation_config"), ('{"top_p": 2}', "top_p"), ('{"top_k": "a"}', "top_k")],
)
def test_bad_generation_config_is_named(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"generation_config\.json.*{named}|{named}.*"):
        GenerationDefaults.from_dir(tmp_path)


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens=6"):
        SamplingParams(max_tokens=5, min_tokens=6)


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 1}, {"bad_words": ("a",)}])
def test_what_may_leave_a_guided_answer_no_token_is_refused(options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(InvalidRequestError, match=f"{name}=.*response_format"):
        SamplingParams(guided=GuidedDecoding("json_object"), **options)


def test_a_guided_request_is_checked_before_the_engine_gets_it() -> None:
    guided, checked = GuidedDecoding("regex", "a+"), []
    assert resolved(SamplingParams(guided=guided), check_guided=checked.append).guided == guided
    assert checked == [guided]
    with pytest.raises(InvalidRequestError, match=r"response_format=.*not available"):
        resolved(SamplingParams(guided=guided))


def test_min_tokens_is_at_most_what_the_context_has_left() -> None:
    """A number of JSON may be longer than any that is sent to the engine."""
    assert resolved(SamplingParams(min_tokens=2**70)).min_tokens == 7
    assert resolved(SamplingParams(min_tokens=2**70, max_tokens=2**71)).min_tokens == 7
    assert resolved(SamplingParams(min_tokens=3, max_tokens=5)).min_tokens == 3


def test_what_the_engine_does_before_a_draw_is_resolved() -> None:
    request = resolved(SamplingParams(logit_bias={7: -100.0, 8: 2.5}, bad_words=("ab",), min_tokens=3, num_logprobs=5))
    assert request.logit_bias == [(7, -100.0), (8, 2.5)]
    assert request.bad_words == [[97, 98], [50, 2]]
    assert (request.min_tokens, request.num_logprobs) == (3, 5)


def test_bad_words_of_tokens_that_the_model_lacks_are_nobodys() -> None:
    """Of a [PAD] that only the tokenizer has: a ban of its id would write beside the row's logits."""
    runs = [[100], [99], [5, 100], [100, 5], [6, 7]]
    assert resolved(SamplingParams(bad_words=("[PAD]",)), encode_word=lambda word: runs).bad_words == [[99], [6, 7]]


@pytest.mark.parametrize(
    ("params", "name"),
    [(SamplingParams(logit_bias={100: 1.0}), "logit_bias"), (SamplingParams(num_logprobs=11), "num_logprobs")],
)
def test_ids_and_counts_beyond_the_vocabulary_are_refused(params: SamplingParams, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        resolved(params, vocab_size=10)
