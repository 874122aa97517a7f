"""Sessions through model.py: what the engine gets as a next turn's prompt, and every way a turn can end."""

from __future__ import annotations

import json
import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from tests.backend.conftest import MAX_MODEL_LEN, Held, Served, error_of, eventually, texts, value
from tests.backend.fake_engine import FakeEngine
from tritonmind.messages import EngineRequest, FinishReason

EOS = 2


def session(number: int = 7, **fields: Any) -> dict[str, Any]:
    """The inputs of a request of a session."""
    step = {"step": np.array([fields.pop("step")], dtype=np.int32)} if "step" in fields else {}
    return {"session_id": np.array([number], dtype=np.uint64), **step, **fields}


def user(text: str) -> str:
    return json.dumps([{"role": "user", "content": text}])


def answer(
    served: Served,
    inputs: dict[str, Any],
    token_ids: list[int],
    reason: FinishReason = "length",
    *,
    stop_token_id: int | None = None,
) -> list[int]:
    """Send a request, have it answered with these tokens, and return the prompt that the engine got."""
    count = len(served.engine.submitted) + 1
    sender = served.send(**inputs)
    request = served.engine.wait_for(count)
    served.engine.output(request.request_id, token_ids, reason, stop_token_id=stop_token_id)
    assert sender.final.wait(30)
    assert not sender.responses[-1].has_error()
    return request.prompt_token_ids


def order(served: Served, **inputs: Any) -> str:
    """What the answer of a request without a prompt says."""
    sender = served.send(**inputs)
    assert sender.final.wait(30)
    (response,) = sender.responses
    assert not response.has_error(), response.error().message()
    assert texts(sender) == [""] and value(response, "finish_reason") == [b"stop"]
    return value(response, "stop_reason")[0].decode()


def chat(served: Served, *texts: str) -> list[int]:
    """Token ids of a whole conversation, as a request without a session has them."""
    turns = [f"<|im_start|>{('user', 'assistant')[i % 2]}\n{text}<|im_end|>\n" for i, text in enumerate(texts)]
    return served.ids("".join(turns) + "<|im_start|>assistant\n")


def test_messages_of_a_session_make_the_prompt_of_the_whole_conversation(served: Served) -> None:
    first = answer(
        served, session(messages=user("a"), sequence_start=True), [*served.ids("b"), EOS], "stop", stop_token_id=EOS
    )
    assert first == chat(served, "a")
    second = answer(served, session(messages=user("c")), served.ids("de"), "length")
    assert second == chat(served, "a", "b", "c")
    assert second[: len(first) + 1] == first + served.ids("b")
    third = answer(served, session(messages=user("f")), served.ids("g"))
    assert third == chat(served, "a", "b", "c", "de", "f"), "an answer cut short was not closed"


def test_generated_ids_stay_as_they_are(served: Served) -> None:
    """Also those that encoding their text would not give: here half a character."""
    odd = [*served.ids("x"), served.ids("\u0416")[0]]
    assert served.ids(served.tokenizer.decode(odd)) != odd
    first = answer(served, session(messages=user("a"), sequence_start=True), odd)
    second = answer(served, session(messages=user("b")), served.ids("c"))
    assert second[: len(first) + len(odd)] == first + odd


def test_text_and_ids_of_a_session_are_appended(served: Served) -> None:
    first = answer(served, session(text_input="one", sequence_start=True), [9, EOS], "stop", stop_token_id=EOS)
    second = answer(served, session(text_input=" two"), [10])
    third = answer(served, session(input_ids=np.array([11, 12], dtype=np.int32)), [13])
    assert second == [*first, 9, EOS, *served.ids(" two")]
    assert third == [*second, 10, 11, 12]


def test_a_stop_string_ends_the_history_where_it_ended_the_answer(served: Served) -> None:
    ids = served.ids("abcXYZdef")
    sender = served.send(**session(text_input="one", sequence_start=True), stop=["X"])
    first = served.engine.wait_for(1)
    served.engine.output(first.request_id, ids)
    assert sender.final.wait(30)
    kept = value(sender.responses[-1], "token_ids")
    assert 0 < len(kept) < len(ids)
    second = answer(served, session(text_input="two"), [9])
    assert second == first.prompt_token_ids + kept + served.ids("two")


def test_step_rewinds(served: Served) -> None:
    first = answer(served, session(messages=user("a"), sequence_start=True), served.ids("bcd"))
    answer(served, session(messages=user("e")), served.ids("f"))
    kept = len(first) + 1
    again = answer(served, session(messages=user("g"), step=kept), served.ids("h"))
    assert again == chat(served, "a", "b", "g")
    assert answer(served, session(messages=user("i"), step=len(first)), served.ids("j")) == chat(served, "a", "", "i")
    assert answer(served, session(text_input="k", step=0), [9]) == served.ids("k")
    assert answer(served, session(text_input="l", step=2), [9]) == [*served.ids("k"), 9, *served.ids("l")]


def test_step_beyond_the_history_and_inside_a_prompt(served: Served) -> None:
    first = answer(served, session(messages=user("abc"), sequence_start=True), [9])
    length = len(first) + 1
    error = error_of(served.send(**session(messages=user("b"), step=length + 1)))
    assert error.code() == served.pb_utils.TritonError.INVALID_ARG
    assert f"step={length + 1}" in error.message() and f"session 7 has {length} tokens" in error.message()
    error = error_of(served.send(**session(messages=user("b"), step=3)))
    assert error.code() == served.pb_utils.TritonError.INVALID_ARG
    assert "step=3 is invalid: is inside a turn's prompt" in error.message()
    assert f"rewind to 0, where the turn before it ends, or to {len(first)}" in error.message()
    assert answer(served, session(messages=user("b")), [9])[:length] == [*first, 9], "a refused turn changed it"


def test_history_of_the_other_kind(served: Served) -> None:
    answer(served, session(1, text_input="a", sequence_start=True), [9])
    answer(served, session(2, messages=user("a"), sequence_start=True), [9])
    for inputs in (session(1, messages=user("b")), session(2, text_input="b")):
        error = error_of(served.send(**inputs))
        assert error.code() == served.pb_utils.TritonError.INVALID_ARG
        assert "session_id=" in error.message()
    answer(served, session(1, messages=user("b"), sequence_start=True), [9])


def test_a_history_that_fills_the_context_is_refused_with_the_numbers(served: Served) -> None:
    first = answer(served, session(text_input="a" * 40, sequence_start=True), [9, 9])
    error = error_of(served.send(**session(input_ids=np.full(MAX_MODEL_LEN, 9, dtype=np.int32))))
    assert error.code() == served.pb_utils.TritonError.INVALID_ARG
    assert f"{len(first) + 2} tokens of history and {MAX_MODEL_LEN} new ones" in error.message()
    assert f"session_len is {MAX_MODEL_LEN}" in error.message()


def test_unknown_session_is_not_found(served: Served) -> None:
    for inputs in ({"text_input": "a"}, {"session_stop": True}, {"sequence_end": True}):
        error = error_of(served.send(**session(**inputs)))
        assert error.code() == served.pb_utils.TritonError.NOT_FOUND
        assert "session expired: session_id=7" in error.message()


def test_the_least_recently_used_session_goes_first(unloaded: Served) -> None:
    unloaded.load({"max_sessions": "2"})
    for number in (1, 2):
        answer(unloaded, session(number, text_input="a", sequence_start=True), [9])
    answer(unloaded, session(1, text_input="b"), [9])
    answer(unloaded, session(3, text_input="a", sequence_start=True), [9])
    assert "session expired" in error_of(unloaded.send(**session(2, text_input="b"))).message()
    answer(unloaded, session(1, text_input="c"), [9])


def test_histories_share_a_number_of_tokens(unloaded: Served) -> None:
    unloaded.load({"max_session_tokens": "30"})
    ids = np.full(11, 9, dtype=np.int32)
    for number in (1, 2, 3):
        answer(unloaded, session(number, input_ids=ids, sequence_start=True), [9])
    assert "session expired" in error_of(unloaded.send(**session(1, text_input="b"))).message()
    for number in (2, 3):
        answer(unloaded, session(number, text_input="b"), [9])


def test_sessions_at_work_are_not_dropped(unloaded: Served) -> None:
    unloaded.load({"max_sessions": "1"})
    running = unloaded.send(**session(1, text_input="a", sequence_start=True))
    first = unloaded.engine.wait_for(1)
    error = error_of(unloaded.send(**session(2, text_input="a", sequence_start=True)))
    assert error.code() == unloaded.pb_utils.TritonError.UNAVAILABLE
    assert "max_sessions=1" in error.message()
    unloaded.engine.output(first.request_id, [9], "length")
    assert running.final.wait(30)
    answer(unloaded, session(2, text_input="a", sequence_start=True), [9])


def test_a_busy_session_takes_no_second_request_and_is_free_with_the_answer(served: Served) -> None:
    sender = served.send(**session(text_input="a", sequence_start=True))
    request = served.engine.wait_for(1)
    for inputs in ({"text_input": "b"}, {"text_input": "b", "sequence_start": True}, {"sequence_end": True}):
        error = error_of(served.send(**session(**inputs)))
        assert error.code() == served.pb_utils.TritonError.UNAVAILABLE
        assert "session 7 is busy" in error.message()
    next_turn = []
    send = sender.send

    def answer_at_once(*args: Any, **kwargs: Any) -> None:
        send(*args, **kwargs)
        next_turn.append(served.send(**session(text_input="c")))

    sender.send = answer_at_once
    served.engine.output(request.request_id, [9], "length")
    second = served.engine.wait_for(2)
    served.engine.output(second.request_id, [9], "length")
    assert next_turn[0].final.wait(30)
    assert not next_turn[0].responses[-1].has_error()


@pytest.mark.parametrize("stream", [False, True])
def test_session_stop_ends_the_running_turn_and_keeps_what_it_had(served: Served, stream: bool) -> None:
    sender = served.send(**session(text_input="a", sequence_start=True), stream=stream)
    request = served.engine.wait_for(1)
    served.engine.output(request.request_id, served.ids("bc"))
    served.engine.output(request.request_id, served.ids("d"))
    assert order(served, **session(session_stop=True)) == "session 7: interrupted"
    assert sender.final.is_set(), "the order was answered before the turn"
    assert "".join(texts(sender)) == "bcd"
    assert value(sender.responses[-1], "finish_reason") == [b"cancelled"]
    assert served.engine.aborted == [request.request_id]
    history = request.prompt_token_ids + served.ids("bc") + served.ids("d")
    assert answer(served, session(text_input="e"), [9]) == history + served.ids("e")
    assert order(served, **session(session_stop=True)) == "session 7: nothing was running"


def test_session_stop_before_the_first_token_leaves_the_history(served: Served) -> None:
    first = answer(served, session(text_input="a", sequence_start=True), [9])
    sender = served.send(**session(text_input="b"))
    served.engine.wait_for(2)
    order(served, **session(session_stop=True))
    assert texts(sender) == [""]
    assert answer(served, session(text_input="c"), [9]) == [*first, 9, *served.ids("c")]


def test_session_stop_while_it_is_tokenised(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = served.model._server._prompts
    build = Held(prompts.build)
    monkeypatch.setattr(prompts, "build", build)
    sender = served.send(**session(text_input="a", sequence_start=True))
    assert build.reached.wait(30)
    stop = served.send(**session(session_stop=True))
    assert not stop.final.wait(0.1)
    build.release.set()
    assert sender.final.wait(30) and stop.final.wait(30)
    assert value(sender.responses[-1], "finish_reason") == [b"cancelled"]
    assert eventually(lambda: served.engine.num_live() == 0)


def test_sequence_end_forgets_after_the_answer(served: Served) -> None:
    answer(served, session(text_input="a", sequence_start=True), [9])
    answer(served, session(text_input="b", sequence_end=True), [9])
    assert "session expired" in error_of(served.send(**session(text_input="c"))).message()
    answer(served, session(text_input="a", sequence_start=True, sequence_end=True), [9])
    assert "session expired" in error_of(served.send(**session(text_input="c"))).message()


def test_sequence_end_alone_and_with_stop(served: Served) -> None:
    answer(served, session(text_input="a", sequence_start=True), [9])
    assert order(served, **session(sequence_end=True)) == "session 7: forgotten"
    assert "session expired" in error_of(served.send(**session(text_input="c"))).message()
    sender = served.send(**session(text_input="a", sequence_start=True))
    served.engine.wait_for(2)
    assert order(served, **session(session_stop=True, sequence_end=True)) == "session 7: interrupted"
    assert sender.final.is_set()
    assert "session expired" in error_of(served.send(**session(text_input="c"))).message()


def test_a_new_start_forgets_the_old_history(served: Served) -> None:
    answer(served, session(text_input="a", sequence_start=True), [9])
    assert answer(served, session(text_input="b", sequence_start=True), [9]) == served.ids("b")


@pytest.mark.parametrize("ended_by", ["client", "deadline", "engine"])
def test_a_turn_that_fails_keeps_its_tokens(served: Served, ended_by: str) -> None:
    first = answer(served, session(text_input="a", sequence_start=True), [9])
    limit = {"timeout_ms": np.array([200], dtype=np.int32)} if ended_by == "deadline" else {}
    sender = served.send(**session(text_input="b"), **limit)
    request = served.engine.wait_for(2)
    served.engine.output(request.request_id, [10, 11])
    if ended_by == "engine":
        served.engine.die()
    sender.cancelled = ended_by == "client"
    error_of(sender)
    assert eventually(served.model.is_ready)
    history = [*first, 9, *served.ids("b"), 10, 11]
    assert answer(served, session(text_input="c"), [9]) == history + served.ids("c")


def test_tokens_that_could_not_be_sent_any_more_are_history_too(served: Served) -> None:
    sender = served.send(**session(text_input="a", sequence_start=True), stream=True)
    request = served.engine.wait_for(1)
    sender.send = send = Held(sender.send)
    served.engine.output(request.request_id, served.ids("b"))
    assert send.reached.wait(30)
    served.engine.output(request.request_id, served.ids("c"))
    sender.cancelled = True
    assert eventually(lambda: served.engine.aborted == [request.request_id])
    send.release.set()
    error_of(sender)
    history = request.prompt_token_ids + served.ids("b") + served.ids("c")
    assert answer(served, session(text_input="d"), [9]) == history + served.ids("d")


def test_a_turn_without_a_token_leaves_the_history(served: Served) -> None:
    first = answer(served, session(text_input="a", sequence_start=True), [9, 9])
    served.engine.queue_full = True
    error_of(served.send(**session(text_input="b", step=1, sequence_end=True)))
    served.engine.queue_full = False
    error_of(served.send(**session(text_input="b", timeout_ms=np.array([60], dtype=np.int32))))
    served.engine.wait_for(2)
    served.engine.die()
    assert eventually(lambda: len(served.engines) == 2 and served.model.is_ready())
    assert answer(served, session(text_input="c"), [9]) == [*first, 9, 9, *served.ids("c")]


def test_cancel_goes_by_the_request_s_id(served: Served) -> None:
    senders = [served.send(text_input="a", stream=True, request_id=name) for name in ("one", "two", "one")]
    for count in (1, 2, 3):
        served.engine.output(served.engine.wait_for(count).request_id, served.ids("b"))
    assert order(served, cancel=True, request_id="one") == "request 'one': cancelled"
    for sender in (senders[0], senders[2]):
        assert sender.final.is_set()
        assert "".join(texts(sender)) == "b"
        assert value(sender.responses[-1], "finish_reason") == [b"cancelled"]
    assert not senders[1].final.is_set()
    error = error_of(served.send(cancel=True, request_id="three"))
    assert error.code() == served.pb_utils.TritonError.NOT_FOUND
    assert "'three'" in error.message()
    assert order(served, cancel=True, request_id="two") == "request 'two': cancelled"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"text_input": "a", "sequence_start": True}, "sequence_start=True is invalid: send the session_id"),
    ({"text_input": "a", "sequence_end": True}, "sequence_end=True"),
    ({"session_stop": True}, "session_stop=True"),
    ({"text_input": "a", "step": np.array([0], dtype=np.int32)}, "step=0"),
    (session(session_stop=True, sequence_start=True), "session_stop=True is invalid: a session cannot start and stop"),
    (session(session_stop=True, text_input="a"), "goes without text_input"),
    (session(session_stop=True, step=1), "goes without step"),
    (session(text_input="a", sequence_start=True, step=1), "step=1 is invalid: a session that starts has no history"),
    (session(text_input="a", step=-1), "step=-1 is invalid: must be 0 to 2147483647"),
    (session(sequence_start=True), "exactly one of"),
    (session(sequence_end=True, step=1), "exactly one of"),
    (session(), "exactly one of"),
    ({"text_input": "a", "parameters": {"session_id": -1}}, "session_id=-1 is invalid: must be 0 to"),
    ({"text_input": "a", "parameters": {"session_id": 2**64}}, f"session_id={2**64}"),
    ({"text_input": "a", "parameters": {"session_id": "x"}}, "session_id='x'"),
    ({**session(text_input="a", sequence_start=True), "parameters": {"session_id": 8}}, "contradicts"),
    ({"text_input": "a", "session_id": np.array([1, 2], dtype=np.uint64)}, "session_id='shape [2]'"),
    ({"cancel": True}, "cancel=True is invalid: give this request the id"),
    ({"cancel": True, "text_input": "a", "request_id": "x"}, "leave out text_input"),
    ({**session(cancel=True, sequence_end=True), "request_id": "x"}, "leave out session_id"),
    ({"text_input": "a", "priority": np.array([-1], dtype=np.int32)}, "priority=-1 is invalid: must be 0 to"),
    ({"text_input": "a", "parameters": {"priority": "high"}}, "priority='high'"),
    ({"text_input": "a", "timeout_ms": np.array([-5], dtype=np.int32)}, "timeout_ms=-5.0"),
    ({"text_input": "a", "parameters": {"timeout": "soon"}}, "timeout='soon'"),
    ({"text_input": "a", "parameters": {"timeout": 9, "timeout_ms": 1}}, "contradicts"),
    (session(text_input="a", sequence_start=True, sampling_parameters='{"n": 2}'), "n=2 is invalid: a session goes on"),
    ({"text_input": "a", "sampling_parameters": '{"session_id": 1}'}, "unknown key in sampling_parameters"),
]


@pytest.mark.parametrize(("fields", "named"), BAD)
def test_bad_request_is_named_at_once_and_the_next_is_answered(
    served: Served, fields: dict[str, Any], named: str
) -> None:
    begin = time.process_time()  # not the clock, which others on the machine run down
    error = error_of(served.send(**fields))
    assert time.process_time() - begin < 0.05
    assert error.code() == served.pb_utils.TritonError.INVALID_ARG
    assert named in error.message()
    answer(served, {"text_input": "good"}, [9])


def test_many_sessions_with_random_ends(unloaded: Served) -> None:
    """Whatever happens to other sessions and turns, a history is what was sent before and the tokens that came."""

    def script(engine: FakeEngine, request: EngineRequest) -> None:
        for number in range(3):
            time.sleep(random.random() * 0.003)
            if not engine.output(request.request_id, [9 + number]):
                return
        engine.output(request.request_id, [12], "length")

    unloaded.script = script
    unloaded.load()
    execute = threading.Lock()

    def send(**inputs: Any) -> Any:
        with execute:  # a server calls execute on one thread
            return unloaded.send(**inputs)

    def converse(number: int) -> None:
        history: list[int] = []
        draw = random.Random(number)
        start = True
        for _ in range(6):
            sender = send(**session(number, input_ids=np.array([20 + number], dtype=np.int32), sequence_start=start))
            start = False
            stop = send(**session(number, session_stop=True)) if draw.random() < 0.4 else None
            assert sender.final.wait(10) and (stop is None or stop.final.wait(10))
            last = sender.responses[-1]
            assert not last.has_error(), last.error().message()
            tokens = value(last, "token_ids")
            if tokens:
                history += [20 + number, *tokens]
            prompt = value(last, "num_input_tokens")[0]
            assert prompt + len(tokens) == len(history) or not tokens, "the history is not what was answered"

    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            converse(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert eventually(lambda: unloaded.engine.num_live() == 0)
