"""`response_format` in the adapter: what reaches the engine, what is refused before, and who waits for it."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from tests.backend.conftest import Served, error_of, eventually
from tritonmind.grammars import GrammarCompiler
from tritonmind.messages import GuidedDecoding

REGEX = {"type": "regex", "regex": "a+"}


def test_the_engine_gets_what_can_be_followed(served: Served) -> None:
    sender = served.send(text_input="a", response_format=json.dumps(REGEX))
    request = served.engine.wait_for(1)
    assert request.guided == GuidedDecoding("regex", "a+")
    served.engine.output(request.request_id, [*served.ids("aa"), 2], "stop", stop_token_id=2)
    assert sender.final.wait(5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"response_format": '{"type": "regex", "regex": "(a"}'}, "unclosed group"),
        ({"response_format": '{"type": "json_schema", "json_schema": {"schema": {"enum": []}}}'}, "Unsatisfiable"),
        ({"response_format": "["}, "known are"),
        ({"response_format": json.dumps(REGEX), "ignore_eos": True}, "ignore_eos=True"),
        ({"response_format": json.dumps(REGEX), "bad_words": ["a"]}, "bad_words="),
    ],
)
def test_what_cannot_is_refused_before(served: Served, options: dict[str, Any], named: str) -> None:
    error = error_of(served.send(text_input="a", **options))
    assert error.code() == served.pb_utils.TritonError.INVALID_ARG and named in error.message()
    assert not served.engine.submitted


def test_no_other_request_waits_for_a_compilation(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many guided ones as there are intake threads, and one more, which its client gives up meanwhile."""
    going_on = threading.Event()
    compile_one = GrammarCompiler._compile

    def compile_slowly(self: GrammarCompiler, guided: GuidedDecoding) -> Any:
        assert going_on.wait(30)
        return compile_one(self, guided)

    monkeypatch.setattr(GrammarCompiler, "_compile", compile_slowly)
    given_up, *others = [served.send(text_input="slow", response_format=json.dumps(REGEX)) for _ in range(3)]
    quick = served.send(text_input="quick")
    assert served.engine.wait_for(1).guided is None
    given_up.cancelled = True
    assert "cancelled" in error_of(given_up).message()
    going_on.set()
    assert eventually(lambda: len(served.engine.submitted) == 3)
    for request in served.engine.submitted:
        served.engine.output(request.request_id, [2], "stop", stop_token_id=2)
    assert all(sender.final.wait(5) for sender in (quick, *others))
