"""n answers to one prompt: a response tells about all of them, and the request ends with the last."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.backend.conftest import Served, error_of, eventually, value

N = np.array([3], dtype=np.int32)


def send(served: Served, **inputs: Any) -> Any:
    sender = served.send(text_input="hello", n=N, seed=np.array([9], dtype=np.uint64), **inputs)
    requests = [served.engine.wait_for(number) for number in (1, 2, 3)]
    assert [request.request_id for request in requests] == [0, 1, 2]
    assert [request.seed for request in requests] == [9, 10, 11]
    assert [request.parent_id for request in requests] == [None, 0, 0]
    return sender


def test_one_response_with_all_answers(served: Served) -> None:
    sender = send(served)
    served.engine.output(1, served.ids("two"), "length", num_cached_tokens=7)
    served.engine.output(0, [*served.ids("one"), 2], "stop", stop_token_id=2)
    assert not sender.final.wait(0.1)
    served.engine.output(2, served.ids("three!"), "length")
    assert sender.final.wait(30)
    (response,) = sender.responses
    assert value(response, "text_output") == [b"one", b"two", b"three!"]
    assert value(response, "finish_reason") == [b"stop", b"length", b"length"]
    assert value(response, "stop_reason") == [b"2", b"", b""]
    counts = value(response, "num_output_tokens")
    assert counts == [len(served.ids("one")) + 1, len(served.ids("two")), len(served.ids("three!"))]
    assert value(response, "token_ids") == [*served.ids("one"), 2, *served.ids("two"), *served.ids("three!")]
    assert value(response, "num_cached_tokens") == [0], "that of the answer that computed the prompt"


def test_streamed_pieces_add_up_to_each_answer(served: Served) -> None:
    sender = send(served, stream=True)
    served.engine.output(0, served.ids("a"))
    assert eventually(lambda: len(sender.responses) == 1)
    assert value(sender.responses[0], "text_output") == [b"a", b"", b""]
    served.engine.output(2, served.ids("c"), "length")
    assert eventually(lambda: len(sender.responses) == 2)
    assert value(sender.responses[1], "finish_reason") == [b"", b"", b"length"]
    served.engine.output(0, served.ids("A"), "length")
    served.engine.output(1, served.ids("b"), "length")
    assert sender.final.wait(30)
    parts = [value(response, "text_output") for response in sender.responses]
    assert [b"".join(texts) for texts in zip(*parts, strict=True)] == [b"aA", b"b", b"c"]
    assert value(sender.responses[-1], "finish_reason") == [b"length"] * 3


def test_a_stop_string_ends_its_answer_alone(served: Served) -> None:
    sender = send(served, stop=["STOP"])
    served.engine.output(1, served.ids("x STOP y"))
    assert eventually(lambda: served.engine.aborted == [1])
    served.engine.output(0, served.ids("first"), "length")
    served.engine.output(2, served.ids("third"), "length")
    assert sender.final.wait(30)
    assert value(sender.responses[0], "text_output") == [b"first", b"x ", b"third"]
    assert value(sender.responses[0], "stop_reason") == [b"", b"STOP", b""]


def test_a_cancelled_request_gives_all_its_answers_up(served: Served) -> None:
    sender = send(served, stream=True)
    served.engine.output(0, served.ids("a"))
    sender.cancelled = True
    assert sender.final.wait(30)
    assert error_of(sender).code() == served.pb_utils.TritonError.CANCELLED
    assert sorted(set(served.engine.aborted)) == [0, 1, 2]
