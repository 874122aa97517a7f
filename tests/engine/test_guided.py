"""Guided answers through the whole engine, with and without a step in flight."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.test_sampling_options import DEVICES, PROMPTS, Served
from tritonmind import grammars
from tritonmind.engine.llm import Completion
from tritonmind.engine.step_handle import StepHandle
from tritonmind.errors import UnavailableError
from tritonmind.grammars import GrammarCompiler
from tritonmind.guided import parse_response_format
from tritonmind.messages import TokenOutput
from tritonmind.sampling_params import SamplingParams

# A random model draws any token that it may: bounds on all that could go on let it come to an end.
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad", None]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
LIST = {
    "type": "array",
    "items": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-z]{1,4}$"}]},
    "minItems": 1,
    "maxItems": 3,
    "x-guidance": {"whitespace_pattern": "[ \\n]{1,3}"},
}
NESTED = {
    "$ref": "#/$defs/node",
    "$defs": {
        "leaf": {"const": {"x": [1, 2.5, "é\n"]}},
        "node": {
            "type": "object",
            "properties": {"leaf": {"$ref": "#/$defs/leaf"}, "day": {"type": "string", "format": "date"}},
            "required": ["leaf", "day"],
            "additionalProperties": False,
        },
    },
    "x-guidance": {"whitespace_flexible": False},
}
EXPRESSIONS = [r"\d{3}-\d{4}", "(yes|no|perhaps)!{0,3}", "[^a]{2,9}"]


@pytest.fixture(scope="module", params=DEVICES, ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # Fewer blocks than as many sequences need: some are preempted.
    options = {"max_num_seqs": 12, "cache_max_entry_count": 20, "num_threads": 1}
    served = Served(tmp_path_factory.mktemp("guided"), *request.param, **options)
    yield served
    served.llm.close()


def regex(expression: str) -> dict[str, Any]:
    return {"guided": parse_response_format({"type": "regex", "regex": expression})}


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"guided": parse_response_format({"type": "json_schema", "json_schema": {"schema": value}})}


def generate(served: Served, **options: Any) -> list[Completion]:
    return served.generate(**{"ignore_eos": False, "max_tokens": 400, "temperature": 1.0, "seed": 5, **options})


def test_two_hundred_answers_are_what_was_asked_for(served: Served) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    share = 14 if served.async_depth else 1  # of them all once, where more can go wrong
    num_answers = 0
    for wanted in (PERSON, LIST, NESTED):
        validator = jsonschema_rs.validator_for(wanted, validate_formats=True)
        for answer in generate(served, **schema(wanted), n=share):
            assert answer.finish_reason == "stop", answer.text
            validator.validate(json.loads(answer.text))
            num_answers += 1
    for expression in EXPRESSIONS:
        for answer in generate(served, **regex(expression), n=share, top_k=20, repetition_penalty=1.3, top_p=0.9):
            assert answer.finish_reason == "stop" and re.fullmatch(expression, answer.text), answer.text
            num_answers += 1
    assert num_answers == 18 * share and (share == 1 or num_answers >= 200)


def test_any_object(served: Served) -> None:
    """Nothing bounds these: one that comes to an end is an object, and those that are cut off say so."""
    answers = generate(served, guided=parse_response_format({"type": "json_object"}), n=4, max_tokens=60)
    reasons = {answer.finish_reason for answer in answers}
    assert reasons <= {"stop", "length"} and "stop" in reasons
    for answer in answers:
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)
        else:
            assert len(answer.token_ids) == 60 and answer.text.lstrip().startswith("{")


def test_the_likeliest_allowed_token_is_taken_and_logprobs_are_the_models(served: Served) -> None:
    """Words of three letters, a or b: what may follow is known without a grammar, what is likely by Transformers."""
    words = {"".join(letters).encode() for letters in itertools.product("ab", repeat=3)}
    eos = served.llm.model.eos_token_ids[0]
    vocabulary = [served.llm.tokenizer.token_bytes(number) for number in range(served.llm.model.vocab_size)]
    answers = generate(served, **regex("[ab]{3}"), temperature=0.0, num_logprobs=2)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.logprobs is not None and answer.finish_reason == "stop" and answer.token_ids[-1] == eos
        text = b""
        for token_id, row, said in zip(
            answer.token_ids, served.logits(prompt, answer.token_ids), answer.logprobs, strict=True
        ):
            may_follow = [n for n, b in enumerate(vocabulary) if b and any(w.startswith(text + b) for w in words)]
            may_follow = [eos] if text in words else may_follow
            assert token_id == may_follow[int(row[may_follow].argmax())]
            assert said.logprob == pytest.approx(float(row.log_softmax(0)[token_id]), abs=1e-3)
            assert said.top[0][0] == int(row.argmax()), "the likeliest of all, allowed or not"
            text += vocabulary[token_id]


def test_others_in_the_batch_are_as_without_it(served: Served) -> None:
    """Guided and other requests at once, which take the places of each other as they end."""
    options = {"max_tokens": 30, "temperature": 0.8, "ignore_eos": True}
    alone = [served.llm.generate([PROMPTS[n % 3]], SamplingParams(seed=n, **options))[0] for n in range(4)]
    guided_alone = generate(served, **regex(EXPRESSIONS[0]), seed=9)
    outputs: dict[int, list[int]] = {}
    ended = threading.Semaphore(0)

    def take(output: TokenOutput) -> None:
        outputs.setdefault(output.request_id, []).extend(output.token_ids)
        if output.finish_reason is not None:
            ended.release()

    requests = []
    for number in range(4):
        requests.append(served.llm.request(PROMPTS[number % 3], SamplingParams(seed=number, **options)))
        guided = SamplingParams(seed=9, max_tokens=400, temperature=1.0, **regex(EXPRESSIONS[0]))
        requests.append(served.llm.request(PROMPTS[number % 3], guided))
    for request in requests:
        served.llm.engine.submit(request, take)
    for _ in requests:
        assert ended.acquire(timeout=120)
    for number, request in enumerate(requests):
        expected = guided_alone[number // 2 % 3] if number % 2 else alone[number // 2]
        assert outputs[request.request_id] == expected.token_ids
    served.llm.engine.check_integrity()


def test_preempted_answers_go_on_where_they_were(served: Served) -> None:
    """The cache is too small for so many. The last to come goes first, and its answer is the one that it has alone."""
    before = served.llm.engine.stats().num_preemptions
    prompts = [[*range(3, 60), number] for number in range(3, 15)]
    params = SamplingParams(seed=3, max_tokens=90, temperature=1.0, **regex("(?s)[^a]{24}"))
    together = served.llm.generate(prompts, params)
    assert {answer.finish_reason for answer in together} == {"stop"}
    assert all(re.fullmatch("(?s)[^a]{24}", answer.text) for answer in together)
    assert served.llm.generate(prompts[-1:], params)[0].token_ids == together[-1].token_ids
    assert served.llm.engine.stats().num_preemptions > before, "nothing was preempted: the test shows nothing"
    served.llm.engine.check_integrity()


def test_a_stop_string_ends_it_early(served: Served) -> None:
    for answer in generate(served, **regex("a{5}x{5}"), stop=("xx",)):
        assert answer.text == "aaaaa" and answer.finish_reason == "stop"


def test_a_grammar_that_cannot_be_followed_ends_its_own_request_only(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of the library's, reached in the middle of an answer."""
    monkeypatch.setattr(grammars, "STEP_LEXER_FUEL", 300)
    expression = "bb(.{0,5000}a.{0,5000}b.{0,5000}){0,5000}"
    results: dict[str, list[TokenOutput]] = {"guided": [], "other": []}
    done = {name: threading.Event() for name in results}

    def submit(name: str, params: SamplingParams) -> None:
        def take(output: TokenOutput) -> None:
            results[name].append(output)
            if output.finish_reason is not None:
                done[name].set()

        served.llm.engine.submit(served.llm.request(PROMPTS[0], params), take)

    submit("other", SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    submit("guided", SamplingParams(max_tokens=400, temperature=1.0, seed=1, **regex(expression)))
    assert all(event.wait(120) for event in done.values())
    last = results["guided"][-1]
    assert last.finish_reason == "error" and last.error is not None
    assert re.search("response_format.*cannot be followed", last.error)
    assert sum(len(output.token_ids) for output in results["other"]) == 60
    with pytest.raises(UnavailableError, match="cannot be followed"):
        generate(served, **regex(expression))
    served.llm.engine.check_integrity()


def test_a_slow_compilation_holds_up_nobody_and_can_be_cancelled(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on = threading.Event()
    compile_one = GrammarCompiler._compile

    def compile_slowly(self: GrammarCompiler, guided: Any) -> Any:
        assert going_on.wait(120)
        return compile_one(self, guided)

    params = SamplingParams(max_tokens=400, temperature=1.0, seed=1, **regex("slow|x"))
    requests = [served.llm.request(PROMPTS[0], params) for _ in range(2)]
    monkeypatch.setattr(GrammarCompiler, "_compile", compile_slowly)
    outputs: list[list[TokenOutput]] = [[], []]
    ended = threading.Semaphore(0)
    for request, taken in zip(requests, outputs, strict=True):

        def take(output: TokenOutput, taken: list[TokenOutput] = taken) -> None:
            taken.append(output)
            if output.finish_reason is not None:
                ended.release()

        served.llm.engine.submit(request, take)
    assert len(served.llm.generate([PROMPTS[1]], SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids) == 5
    assert served.llm.engine.stats().num_waiting == 2
    served.llm.engine.abort([requests[0].request_id])
    assert ended.acquire(timeout=60)
    assert [output.finish_reason for output in outputs[0]] == ["cancelled"] and not outputs[1]
    going_on.set()
    assert ended.acquire(timeout=60)
    assert outputs[1][-1].finish_reason == "stop"
    served.llm.engine.check_integrity()


def test_only_steps_with_a_guided_row_wait_for_the_token_before(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []
    draw = StepHandle.draw

    def watched(self: StepHandle) -> Any:
        waited.append(callable(self._drawn))
        return draw(self)

    monkeypatch.setattr(StepHandle, "draw", watched)
    served.generate(temperature=0.7, num_logprobs=1)
    assert waited and not any(waited)
    waited.clear()
    generate(served, **regex("ab"))
    assert all(waited[1:-1])
