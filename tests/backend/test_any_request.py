"""Any request at all, to model.py and a real engine: answered or refused in the client's words, never a crash or hang.

TRITONMIND_HYPOTHESIS_REQUESTS: about how many requests to draw, instead of few enough for every day.
"""

from __future__ import annotations

import gc
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.backend.any_request import BY_NAME, JSON_KEYS, SESSION_IDS, UNSUPPORTED_KEYS, DrawnRequest, requests
from tests.backend.conftest import value
from tests.workspaces import tiny_workspace
from tritonmind.engine.thread_client import ThreadEngineClient
from tritonmind.messages import ToEngine
from tritonmind.request_fields import OUTPUTS

NUM_REQUESTS = int(os.environ.get("TRITONMIND_HYPOTHESIS_REQUESTS", 400))
SESSION_LEN = 64
FINAL_TIMEOUT_S = 60.0  # n = 128 answers of a whole context take seconds on a busy machine
REFUSAL_CPU_S = 0.05
NUM_REFUSAL_ATTEMPTS = 3
MAX_MESSAGE_LENGTH = 2000
REFUSALS = ("INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "CANCELLED")
GOOD = {"text_input": np.array([b"The capital"], dtype=np.object_), "temperature": np.array([0.0], dtype=np.float32)}


class WireClient(ThreadEngineClient):
    """The engine in a thread, whose messages are encoded as if it were in a process of its own."""

    def _send(self, *messages: ToEngine) -> None:
        wire = [msgspec.msgpack.encode(message) for message in messages]
        super()._send(*(msgspec.msgpack.decode(message, type=ToEngine) for message in wire))


class Served:
    """A loaded model with a real engine, what was sent to it and how that ended."""

    def __init__(self, adapter: ModuleType, workspace: Path, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(adapter, "start_engine", self._start)
        self.pb_utils = adapter.pb_utils
        self.tally: Counter[str] = Counter()
        self.num_drawn = 0
        self.slowest_refusal_s = 0.0
        self.sent: list[Any] = []
        self.model: Any = adapter.TritonPythonModel()
        options = {
            "device": "cpu", "num_threads": "1", "session_len": str(SESSION_LEN), "block_size": "4",
            "max_num_seqs": "8", "cache_max_entry_count": "40", "max_queue_size": "300",
            "max_sessions": "2", "max_session_tokens": "100",
        }  # fmt: skip
        config = {"max_batch_size": 0, "parameters": {k: {"string_value": v} for k, v in options.items()}}
        self.model.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": str(workspace / "model_repository" / "tritonmind"),
                "model_version": "1",
                "model_name": "tritonmind",
            }
        )
        self.good = self.good_answer()

    def _start(self, path: str, overrides: dict[str, object]) -> WireClient:
        self.engine = WireClient(path, overrides)
        self.engine.wait_ready()
        return self.engine

    def request(self, drawn: DrawnRequest) -> Any:
        made = self.pb_utils.InferenceRequest(
            drawn.inputs,
            parameters=drawn.parameters,
            requested_outputs=drawn.outputs,
            request_id=drawn.request_id,
            timeout=drawn.timeout,
        )
        made.sender.cancelled = drawn.gives_up
        self.sent.append(made)
        return made

    def execute(self, drawn: list[DrawnRequest], *, together: bool) -> list[Any]:
        """Their senders, once all have ended. together: in one call; else each after the one before has ended."""
        made = [self.request(one) for one in drawn]
        for group in [made] if together else [[one] for one in made]:
            assert self.model.execute(group) is None
            for one in group:
                assert one.sender.final.wait(FINAL_TIMEOUT_S), "no final response"
        return [one.sender for one in made]

    def ending(self, sender: Any) -> tuple[str, str]:
        """The code and the message of a request's error, ("", "") if it was answered."""
        error = sender.responses[-1].error()
        if error is None:
            return "", ""
        names = {code: name for name, code in vars(self.pb_utils.TritonError).items() if name.isupper()}
        return names[error.code()], error.message()

    def good_answer(self) -> list[int]:
        (sender,) = self.execute([DrawnRequest(GOOD, {"max_tokens": 4})], together=False)
        assert self.ending(sender) == ("", "")
        return value(sender.responses[-1], "token_ids")


@pytest.fixture(scope="module")
def served(adapter: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    workspace = tiny_workspace(tmp_path_factory.mktemp("any_request"))
    with pytest.MonkeyPatch.context() as patch:
        served = Served(adapter, workspace, patch)
    gc.freeze()  # a collection that walks all of torch would count as time of a refusal
    begin = time.monotonic()
    yield served
    seconds = time.monotonic() - begin
    gc.unfreeze()
    served.engine.check_integrity()
    stats = served.engine.stats()
    assert stats.num_running == stats.num_waiting == stats.num_used_blocks == 0
    served.model.finalize()
    server = served.model._server
    sessions = server._sessions._sessions.values()
    assert all(session.turn is None for session in sessions)
    assert server._sessions.num_tokens == sum(len(session.token_ids) for session in sessions)
    assert server.num_accepted == server.num_finals == len(served.sent)
    assert [one.sender.num_finals for one in served.sent] == [1] * len(served.sent)
    assert all(len(one.sender.threads) == 1 for one in served.sent), "a request changed its thread"
    assert [crash for one in served.sent for crash in one.sender.crashes] == []
    print(
        f"\n{served.num_drawn} requests drawn, {len(served.sent)} sent in {seconds:.0f} s: {dict(served.tally)}; "
        f"slowest refusal {served.slowest_refusal_s * 1000:.1f} ms of CPU"
    )


def check_ending(served: Served, drawn: DrawnRequest, sender: Any) -> None:
    """An answer has what was asked for; a refusal says in a few words what is wrong with the request."""
    code, message = served.ending(sender)
    served.tally[code or "answered"] += 1
    if not code:
        wanted = {output.name for output in OUTPUTS} & set(drawn.outputs or [output.name for output in OUTPUTS])
        assert {tensor.name() for response in sender.responses for tensor in response.output_tensors()} <= wanted
        return
    assert code in REFUSALS, message
    assert message.isprintable(), message
    assert 0 < len(message) <= MAX_MESSAGE_LENGTH, f"{len(message)} characters: {message[:200]}"
    if code == "INVALID_ARG":
        named = re.match(r"(?:(\w+)(?:\[\d+\](?:\.\w+)?)?|(['\"]).*\2)=.+ is invalid: .+", message)
        assert named, message
        given = {*BY_NAME, *JSON_KEYS, *drawn.parameters, *UNSUPPORTED_KEYS, "prompt"}
        assert named[1] in given or " is invalid: unknown " in message, message
    if code == "CANCELLED":
        assert drawn.gives_up, message


def check_speed(served: Served, drawn: DrawnRequest) -> None:
    """A refusal costs the process little CPU time: wall time would be that of whatever else the machine does.

    The quickest of a few attempts counts, as a heartbeat or a collection of garbage may fall into one.
    """
    seconds = []
    for _ in range(NUM_REFUSAL_ATTEMPTS):
        begin = time.process_time()
        (sender,) = served.execute([drawn], together=False)
        seconds.append(time.process_time() - begin)
        if served.ending(sender)[0] != "INVALID_ARG":  # the session has another history now
            return
        if seconds[-1] < REFUSAL_CPU_S:
            break
    served.slowest_refusal_s = max(served.slowest_refusal_s, min(seconds))
    assert min(seconds) < REFUSAL_CPU_S, seconds


@pytest.mark.timeout(3600)
@settings(
    max_examples=NUM_REQUESTS // 2,  # of two requests on average
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(batch=st.lists(requests(), min_size=1, max_size=4), together=st.booleans())
def test_any_request_is_answered_or_refused(served: Served, batch: list[DrawnRequest], together: bool) -> None:
    served.num_drawn += len(batch)
    for drawn, sender in zip(batch, served.execute(batch, together=together), strict=True):
        check_ending(served, drawn, sender)
        if served.ending(sender)[0] == "INVALID_ARG":
            check_speed(served, drawn)
    assert served.good_answer() == served.good
    served.engine.check_integrity()
    # So that an example does the same again, alone.
    forget = [
        {"session_id": np.array([number], dtype=np.uint64), "sequence_end": np.array([True])} for number in SESSION_IDS
    ]
    served.execute([DrawnRequest(inputs) for inputs in forget], together=True)


def test_many_of_those_requests_were_answered(served: Served) -> None:
    """Else the one above has shown little."""
    assert served.tally["answered"] > served.tally.total() / 4
    assert served.tally["INVALID_ARG"] and served.tally["NOT_FOUND"], served.tally
