"""model.py when the model is unloaded or told to drain: live requests end in time, new ones are refused."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.backend.conftest import Served, error_of, eventually, texts
from tritonmind.config import DRAIN_FILE_VARIABLE


def test_finalize_lets_answers_end(served: Served) -> None:
    sender = served.send(text_input="a")
    served.engine.wait_for(1)
    timer = threading.Timer(0.1, lambda: served.engine.output(0, served.ids("z"), "length"))
    timer.start()
    served.model.finalize()
    assert texts(sender) == ["z"]


def test_finalize_ends_what_does_not_end(served: Served) -> None:
    senders = [served.send(text_input="a", stream=True) for _ in range(6)]
    served.engine.wait_for(6)
    begin = time.monotonic()
    served.model.finalize()
    assert time.monotonic() - begin < 2
    for sender in senders:
        error = error_of(sender)
        assert error.code() == served.pb_utils.TritonError.UNAVAILABLE
        assert "0.2 s" in error.message()


def test_no_new_requests_while_it_drains(served: Served) -> None:
    running = served.send(text_input="a")
    served.engine.wait_for(1)
    finalizing = threading.Thread(target=served.model.finalize)
    finalizing.start()
    assert eventually(lambda: not served.model.is_ready())
    error = error_of(served.send(text_input="late"))
    assert error.code() == served.pb_utils.TritonError.UNAVAILABLE
    assert "unloaded" in error.message()
    assert not running.final.is_set()
    finalizing.join()


def test_the_drain_file_ends_requests_before_the_server_says_anything(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "drain"
    monkeypatch.setenv(DRAIN_FILE_VARIABLE, str(file))
    sender = served.send(text_input="a", stream=True)
    served.engine.wait_for(1)
    assert served.model.is_ready()
    file.touch()
    error = error_of(sender)
    assert error.code() == served.pb_utils.TritonError.UNAVAILABLE
    assert "being unloaded" in error.message()
    assert not served.model.is_ready()
