"""model.py: answers, errors, cancellation, engine failure, unloading. The fixtures check FINAL exactly once."""

from __future__ import annotations

import json
import random
import threading
import time
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.backend.conftest import MAX_MODEL_LEN, Held, Served, array_of, error_of, eventually, texts, value
from tests.backend.fake_engine import FakeEngine
from tritonmind.errors import ConfigError, TritonmindError
from tritonmind.messages import EngineRequest, TokenLogprob
from tritonmind.request_fields import INPUTS, OUTPUTS
from tritonmind.serving import MAX_ASKED_PER_SWEEP

MESSAGES = json.dumps([{"role": "user", "content": "hi"}])


def test_stream_is_deltas_and_final_rides_on_the_last(served: Served) -> None:
    sender = served.send(text_input="hello", stream=True, max_tokens=np.array([5], dtype=np.int32))
    request = served.engine.wait_for(1)
    assert request.prompt_token_ids == served.ids("hello")
    assert request.max_tokens == 5
    served.engine.output(0, served.ids("Größe"), num_cached_tokens=3)
    assert eventually(lambda: len(sender.responses) == 1), "the first token did not go out at once"
    assert not sender.final.is_set()
    served.engine.output(0, [*served.ids(" ok"), 2], "stop", stop_token_id=2)
    assert sender.final.wait(30)
    assert texts(sender) == ["Größe", " ok"]
    first, last = sender.responses
    assert value(first, "finish_reason") == [b""]
    assert value(first, "num_cached_tokens") == [3]
    assert value(last, "finish_reason") == [b"stop"]
    assert value(last, "stop_reason") == [b"2"]
    assert value(last, "token_ids") == [*served.ids(" ok"), 2]
    assert value(first, "num_input_tokens") == value(last, "num_input_tokens") == [len(served.ids("hello"))]
    counts = [value(response, "num_output_tokens")[0] for response in sender.responses]
    assert counts == [len(served.ids("Größe")), len(served.ids(" ok")) + 1]


def test_without_stream_there_is_one_response(served: Served) -> None:
    sender = served.send(text_input="hello")
    served.engine.wait_for(1)
    for part in ("a", "b", "c"):
        served.engine.output(0, served.ids(part))
    time.sleep(0.05)
    assert not sender.responses
    served.engine.output(0, served.ids("d"), "length")
    assert sender.final.wait(30)
    assert texts(sender) == ["abcd"]
    assert value(sender.responses[0], "num_output_tokens") == [4]
    assert value(sender.responses[0], "finish_reason") == [b"length"]


def test_pending_tokens_are_merged_while_the_sender_is_busy(served: Served) -> None:
    """Into one response that says what each of them said."""
    sender = served.send(text_input="hello", streaming=True, num_logprobs=np.array([0], dtype=np.int32))
    served.engine.wait_for(1)
    sender.send = send = Held(sender.send)

    def output(part: str, **more: Any) -> None:
        served.engine.output(0, served.ids(part), logprobs=[TokenLogprob(-1.0, 1, [])], **more)

    output("a")
    assert send.reached.wait(30)
    output("b", num_cached_tokens=3)
    for part in "cdefgh":
        output(part)
    output("i", finish_reason="length")
    send.release.set()
    assert sender.final.wait(30)
    assert texts(sender) == ["a", "bcdefghi"]
    last = sender.responses[-1]
    (logprobs,) = map(json.loads, value(last, "logprobs"))
    assert [list(position) for position in logprobs] == [[str(served.ids(part)[0])] for part in "bcdefghi"]
    assert value(last, "num_output_tokens") == [8] and value(last, "cumulative_logprob") == [-9.0]
    assert value(last, "num_cached_tokens") == [3]


def test_stop_string_ends_the_answer_and_the_engine_request(served: Served) -> None:
    sender = served.send(text_input="hello", stream=True, stop=["END", "\n\n"])
    served.engine.wait_for(1)
    for part in ("some", " E", "N"):
        served.engine.output(0, served.ids(part))
    served.engine.output(0, served.ids("D of it"))
    assert sender.final.wait(30)
    assert "".join(texts(sender)) == "some "
    assert value(sender.responses[-1], "stop_reason") == [b"END"]
    assert served.engine.aborted == [0]


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_is_echoed_on_request(served: Served, stream: bool) -> None:
    sender = served.send(text_input="Say: ", stream=stream, exclude_input_in_output=False)
    served.engine.wait_for(1)
    served.engine.output(0, served.ids("yes"), "length")
    assert sender.final.wait(30)
    assert texts(sender) == ["Say: yes"]


def test_messages_go_through_the_template(served: Served) -> None:
    sender = served.send(messages=MESSAGES)
    request = served.engine.wait_for(1)
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert request.prompt_token_ids == served.ids(text)
    assert request.prompt_token_ids.count(1) == 2, "a bos was added to a template that writes its own"
    served.engine.output(0, [2], "stop", stop_token_id=2)
    assert sender.final.wait(30)
    assert texts(sender) == [""]


def test_batch_dimension_in_and_out(unloaded: Served) -> None:
    unloaded.load(max_batch_size=1)
    sender = unloaded.send(
        text_input=np.array([[b"hello"]], dtype=np.object_), stop_words=np.array([[b"X", b"Y"]], dtype=np.object_)
    )
    unloaded.engine.wait_for(1)
    unloaded.engine.output(0, unloaded.ids("abX"), "length")
    assert sender.final.wait(30)
    shapes = {tensor.name(): tensor.as_numpy().shape for tensor in sender.responses[0].output_tensors()}
    assert shapes == {**dict.fromkeys(shapes, (1, 1)), "token_ids": (1, len(unloaded.ids("abX")))}


def test_only_requested_outputs_are_made(served: Served) -> None:
    sender = served.send(text_input="a", outputs=["text_output", "token_ids"], return_token_ids=False)
    served.engine.wait_for(1)
    served.engine.output(0, served.ids("b"), "length")
    assert sender.final.wait(30)
    assert [tensor.name() for tensor in sender.responses[0].output_tensors()] == ["text_output"]


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of text_input, input_ids, messages"),
    ({"text_input": "a", "messages": MESSAGES}, "exactly one of"),
    ({"text_input": ""}, "text_input"),
    ({"text_input": "a", "sampling_parameters": "[" * 100_000}, "sampling_parameters"),
    ({"messages": "[" * 100_000}, "messages"),
    ({"text_input": "word " * MAX_MODEL_LEN}, f"session_len is {MAX_MODEL_LEN}"),
    ({"input_ids": np.array([5, 320], dtype=np.int32)}, "input_ids=320"),
    ({"text_input": "a", "temperature": np.array([np.nan], dtype=np.float32)}, "temperature=nan"),
    ({"text_input": "a", "top_p": np.array([1.5], dtype=np.float32)}, "top_p=1.5"),
    ({"text_input": "a", "max_tokens": np.array([0], dtype=np.int32)}, "max_tokens=0"),
    ({"text_input": "a", "sampling_parameters": '{"temprature": 1}'}, "temprature"),
    ({"text_input": "a", "sampling_parameters": "{"}, "sampling_parameters"),
    ({"text_input": "a", "parameters": {"temprature": 1}}, "temprature"),
    ({"messages": "[]"}, "messages"),
    ({"messages": '[{"role": "user"}]'}, "messages[0].content"),
    ({"text_input": np.array([b"\xff\xfe"], dtype=np.object_)}, "text_input"),
    ({"text_input": ["a", "b"]}, "text_input"),
]


@pytest.mark.parametrize(("fields", "named"), BAD_REQUESTS)
def test_bad_request_is_invalid_arg_and_names_the_field(served: Served, fields: dict[str, Any], named: str) -> None:
    error = error_of(served.send(**fields))
    assert error.code() == served.pb_utils.TritonError.INVALID_ARG
    assert named in error.message()
    good = served.send(text_input="good")
    request = served.engine.wait_for(1)
    served.engine.output(request.request_id, served.ids("x"), "length")
    assert good.final.wait(30)
    assert texts(good) == ["x"]


def test_a_bad_request_does_not_hurt_its_neighbour_in_one_call(served: Served) -> None:
    make = served.pb_utils.InferenceRequest
    bad = make({"text_input": np.array([b"a"], dtype=np.object_), "temperature": np.array([-1.0], dtype=np.float32)})
    good = make({"text_input": np.array([b"a"], dtype=np.object_)})
    broken = make({})
    broken.parameters = lambda: "{"
    served.requests += [bad, broken, good]
    served.model.execute([bad, broken, good])
    assert "temperature" in error_of(bad.sender).message()
    assert error_of(broken.sender).code() == served.pb_utils.TritonError.INTERNAL
    request = served.engine.wait_for(1)
    served.engine.output(request.request_id, served.ids("x"), "length")
    assert good.sender.final.wait(30)
    assert not good.sender.responses[-1].has_error()


@pytest.mark.parametrize("field", ["text_input", "messages"])
def test_a_text_that_cannot_fit_is_refused_without_encoding_it(served: Served, field: str) -> None:
    text = "words " * (8_000_000 if field == "text_input" else 1_000_000)  # JSON and template take their own time
    sent = array_of(text if field == "text_input" else json.dumps([{"role": "user", "content": text}]))
    begin = time.perf_counter()
    error = error_of(served.send(**{field: sent}))
    assert time.perf_counter() - begin < 5, "encoding it takes a minute"
    assert error.code() == served.pb_utils.TritonError.INVALID_ARG
    assert error.message().startswith(f"{field}=")
    assert f"session_len is {MAX_MODEL_LEN} tokens" in error.message()


def test_full_queue_is_unavailable(served: Served) -> None:
    served.engine.queue_full = True
    error = error_of(served.send(text_input="a"))
    assert error.code() == served.pb_utils.TritonError.UNAVAILABLE
    assert "queue is full" in error.message()


@pytest.mark.parametrize("started", [False, True])
def test_cancellation_is_swept(served: Served, started: bool) -> None:
    """Also for a request that has had no token yet, as one that waits in the engine's queue."""
    sender = served.send(text_input="hello", stream=True)
    served.engine.wait_for(1)
    if started:
        served.engine.output(0, served.ids("a"))
    begin = time.monotonic()
    sender.cancelled = True
    error = error_of(sender)
    assert error.code() == served.pb_utils.TritonError.CANCELLED
    assert time.monotonic() - begin < 2
    assert served.engine.aborted == [0]
    assert eventually(lambda: served.engine.num_live() == 0)


def test_of_many_requests_each_is_asked_in_its_turn(served: Served) -> None:
    senders = [served.send(text_input="hello") for _ in range(2 * MAX_ASKED_PER_SWEEP + 5)]
    served.engine.wait_for(len(senders))
    for sender in senders[::3]:
        sender.cancelled = True
    for sender in senders[::3]:
        assert error_of(sender).code() == served.pb_utils.TritonError.CANCELLED
    assert not any(sender.final.is_set() for sender in senders[1::3])


def test_last_response_waits_for_a_running_is_cancelled(served: Served) -> None:
    """A real server crashes when the request ends while it is asked about."""
    sender = served.send(text_input="hello")
    request = served.engine.wait_for(1)
    is_cancelled = sender.is_cancelled
    sender.is_cancelled = held = Held(is_cancelled)
    assert held.reached.wait(30)
    served.engine.output(request.request_id, served.ids("x"), "length")
    assert not sender.final.wait(0.1)
    sender.is_cancelled = is_cancelled
    held.release.set()
    assert sender.final.wait(30)


def test_cancelled_while_it_is_tokenised(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = served.model._server._prompts
    build = Held(prompts.build)
    monkeypatch.setattr(prompts, "build", build)
    sender = served.send(text_input="hello")
    assert build.reached.wait(30)
    sender.cancelled = True
    assert error_of(sender).code() == served.pb_utils.TritonError.CANCELLED
    build.release.set()
    served.engine.wait_for(1)
    assert eventually(lambda: served.engine.num_live() == 0), "a request nobody waits for runs on in the engine"


def test_dead_engine_is_replaced(served: Served) -> None:
    first = served.engine
    senders = [served.send(text_input="a", stream=True) for _ in range(5)]
    first.wait_for(5)
    assert served.model.is_ready()
    first.die("killed by signal 9")
    assert not served.model.is_ready()
    for sender in senders:
        error = error_of(sender)
        assert error.code() == served.pb_utils.TritonError.UNAVAILABLE
        assert "killed by signal 9" in error.message()
    assert eventually(lambda: len(served.engines) == 2 and served.model.is_ready())
    sender = served.send(text_input="b")
    served.engine.wait_for(1)
    served.engine.output(0, served.ids("y"), "length")
    assert sender.final.wait(30)
    assert texts(sender) == ["y"]


@pytest.mark.parametrize("failure", [TritonmindError("no memory"), OSError(12, "Cannot allocate memory")])
def test_engine_that_does_not_start_again_is_retried(served: Served, failure: Exception) -> None:
    served.start_failures = [failure]
    served.engine.die()
    assert eventually(lambda: not served.start_failures)
    error = error_of(served.send(text_input="a"))
    assert error.code() == served.pb_utils.TritonError.UNAVAILABLE
    assert "restarted" in error.message()
    assert eventually(lambda: len(served.engines) == 2 and served.model.is_ready())


def test_engine_failure_can_stop_the_server(
    unloaded: Served, adapter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()
    monkeypatch.setattr(adapter, "_stop_server", stopped.set)
    unloaded.load({"engine_failure": "exit"})
    unloaded.engine.die()
    assert stopped.wait(30)
    assert not unloaded.model.is_ready()
    assert len(unloaded.engines) == 1
    error = error_of(unloaded.send(text_input="a"))
    assert error.code() == unloaded.pb_utils.TritonError.UNAVAILABLE
    assert error.message() == "the engine is down"


def test_a_response_that_cannot_be_sent_ends_its_request_only(served: Served) -> None:
    sender, other = (served.send(text_input="a", stream=True) for _ in range(2))
    served.engine.wait_for(2)
    send, failures = sender.send, [RuntimeError("no shared memory")]

    def failing(*args: Any, **kwargs: Any) -> None:
        if failures:
            raise failures.pop()
        send(*args, **kwargs)

    sender.send = failing
    # Which of the two has which id in the engine depends on the intake threads.
    for request_id in (0, 1):
        served.engine.output(request_id, served.ids("b"))
    error = error_of(sender)
    assert error.code() == served.pb_utils.TritonError.INTERNAL
    assert "no shared memory" in error.message()
    assert eventually(lambda: len(served.engine.aborted) == 1)
    (aborted,) = served.engine.aborted
    served.engine.output(1 - aborted, served.ids("c"), "length")
    assert other.final.wait(30)
    assert "".join(texts(other)) == "bc"


def test_many_streams_with_random_cancels(unloaded: Served) -> None:
    """Every stream that is not cancelled gets exactly its own tokens, in order."""

    def script(engine: FakeEngine, request: EngineRequest) -> None:
        for token_id in request.prompt_token_ids * 5:
            time.sleep(random.random() * 0.004)
            if not engine.output(request.request_id, [token_id]):
                return
        engine.output(request.request_id, [], "length")

    unloaded.script = script
    unloaded.load()
    senders = [(f"stream {i}, ", unloaded.send(text_input=f"stream {i}, ", stream=i % 4 > 0)) for i in range(64)]
    cancelled = random.sample(senders, 16)
    for _, sender in cancelled:
        time.sleep(0.002)
        sender.cancelled = True
    for _, sender in senders:
        assert sender.final.wait(10)
    survivors = [(text, sender) for text, sender in senders if not sender.responses[-1].has_error()]
    assert len(survivors) >= 48
    for text, sender in survivors:
        assert "".join(texts(sender)) == text * 5
    assert eventually(lambda: unloaded.engine.num_live() == 0)


def test_parameters_become_overrides(unloaded: Served) -> None:
    given = {"device": "cpu", "num_threads": "2", "enforce_eager": "true", "dtype": "", "EXECUTION_ENV_PATH": "x"}
    unloaded.load(given)
    assert unloaded.overrides == {"device": "cpu", "num_threads": 2, "enforce_eager": True}


@pytest.mark.parametrize(("name", "text"), [("engine_failure", "explode"), ("drain_timeout_s", "soon")])
def test_bad_parameter_is_named(unloaded: Served, name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='{text}'"):
        unloaded.load({name: text})


def test_auto_complete_adds_what_is_missing_and_leaves_the_rest(adapter: ModuleType) -> None:
    mine = {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1], "optional": False}
    config = adapter.pb_utils.ModelConfig({"input": [mine], "max_batch_size": 1})
    completed = adapter.TritonPythonModel.auto_complete_config(config).as_dict()
    assert completed["input"][0] == mine
    assert [tensor["name"] for tensor in completed["input"]] == [field.name for field in INPUTS]
    assert [tensor["name"] for tensor in completed["output"]] == [field.name for field in OUTPUTS]
    assert completed["model_transaction_policy"] == {"decoupled": True}
    assert completed["max_batch_size"] == 1


def test_logprobs_are_written_as_vllm_writes_them(served: Served) -> None:
    sender = served.send(text_input="hello", stream=True, num_logprobs=np.array([2], dtype=np.int32))
    served.engine.wait_for(1)
    first, second = served.ids("ab")[:1], served.ids("xy")[:1]
    served.engine.output(0, first, logprobs=[TokenLogprob(-0.5, 1, [(first[0], -0.5), (9, -1.5)])])
    assert eventually(lambda: len(sender.responses) == 1)
    served.engine.output(0, second, "length", logprobs=[TokenLogprob(-4.0, 7, [(8, -0.25), (9, -1.5)])])
    assert sender.final.wait(30)
    (text,) = value(sender.responses[0], "logprobs")
    (position,) = json.loads(text)
    assert position[str(first[0])]["rank"] == 1 and position[str(first[0])]["logprob"] == -0.5
    assert position["9"]["rank"] == 2 and set(position) == {str(first[0]), "9"}
    assert position[str(first[0])]["decoded_token"] == served.tokenizer.decode(first)
    (text,) = value(sender.responses[1], "logprobs")
    (position,) = json.loads(text)
    assert position[str(second[0])] == {
        "logprob": -4.0,
        "rank": 7,
        "decoded_token": served.tokenizer.decode(second),
    }
    totals = [value(response, "cumulative_logprob")[0] for response in sender.responses]
    assert totals == [-0.5, -4.5]


def test_logprobs_of_the_prompt_come_with_the_first_response(served: Served) -> None:
    sender = served.send(text_input="hello", stream=True, num_prompt_logprobs=np.array([1], dtype=np.int32))
    prompt = served.engine.wait_for(1).prompt_token_ids
    logprobs = [None, *(TokenLogprob(-0.5 * n, 1, [(token_id, -0.5 * n)]) for n, token_id in enumerate(prompt[1:], 1))]
    served.engine.output(0, served.ids("a"), prompt_logprobs=logprobs)
    assert eventually(lambda: len(sender.responses) == 1)
    served.engine.output(0, served.ids("b"), "length")
    assert sender.final.wait(30)
    first, last = (json.loads(value(response, "prompt_logprobs")[0]) for response in sender.responses)
    assert last is None and len(first) == len(prompt) and first[0] is None
    for number, (token_id, position) in enumerate(zip(prompt[1:], first[1:], strict=True), start=1):
        assert position == {
            str(token_id): {
                "logprob": -0.5 * number,
                "rank": 1,
                "decoded_token": served.tokenizer.decode([token_id], skip_special_tokens=False),
            }
        }


def test_answers_have_no_logprobs_unless_asked_for(served: Served) -> None:
    sender = served.send(text_input="hello")
    served.engine.wait_for(1)
    served.engine.output(0, served.ids("a"), "length")
    assert sender.final.wait(30)
    names = {tensor.name() for tensor in sender.responses[0].output_tensors()}
    assert "text_output" in names and not {"logprobs", "cumulative_logprob", "prompt_logprobs"} & names
