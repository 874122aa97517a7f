"""The console client without a server: addresses, refusals, connections. test_real_server.py has the rest."""

from __future__ import annotations

import argparse
import io
import socket
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from tritonmind.errors import ConfigError, InvalidRequestError, UnavailableError
from tritonmind_tools import triton_client
from tritonmind_tools.console_transport import Delta
from tritonmind_tools.triton_client import AnswerError, TritonClient, parse_address


def test_addresses() -> None:
    assert parse_address("127.0.0.1:33337") == ("127.0.0.1", 33337)
    assert parse_address("host:1") == ("host", 1)
    assert parse_address("[::1]:33337") == ("::1", 33337)


@pytest.mark.parametrize("address", ["host", "host:", ":33337", "host:0", "host:65536", "host:port", ""])
def test_malformed_address_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match=r"must be host:port, e\.g\. 127"):
        parse_address(address)


def test_scheme_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"leave out http://.*e\.g\. 127\.0\.0\.1:33337"):
        parse_address("http://127.0.0.1:33337")


def test_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=f"no server answers at {address}.*refused"):
            TritonClient(address)


class FakeClient:
    """Stands in for TritonClient: answers with prepared deltas, or raises. Each `connect` counts."""

    connections: ClassVar[list[str]] = []
    answers: ClassVar[list[list[Delta | BaseException]]] = []
    requests: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, address: str) -> None:
        if address == "nobody:1":
            raise UnavailableError(f"no server answers at {address}")
        self.connections.append(address)

    def generate(self, **request: Any) -> Iterator[Delta]:
        self.requests.append(request)
        for item in self.answers.pop(0):
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    for name in ("connections", "answers", "requests"):
        monkeypatch.setattr(FakeClient, name, [])
    monkeypatch.setattr(triton_client, "TritonClient", FakeClient)
    return FakeClient


def deltas(*texts: str) -> list[Delta | BaseException]:
    last = len(texts) - 1
    return [
        Delta(text=text, num_tokens=1, finish_reason="stop" if index == last else None)
        for index, text in enumerate(texts)
    ]


def run(line: str, text: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command `triton_client` with `text` piped into it."""
    parser = argparse.ArgumentParser()
    triton_client.register(parser.add_subparsers())
    args = parser.parse_args(["triton_client", *line.split()])
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    exit_code: int = args.run(args)
    return exit_code


def test_conversation_keeps_its_history(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers += [deltas("Hel", "lo"), deltas("Bye")]
    assert run("h:1 --system s", "hi\n\n  \nand then\n\nexit\nnever\n", monkeypatch) == 0
    system = {"role": "system", "content": "s"}
    first = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}]
    second = {"role": "user", "content": "and then"}
    assert [request["messages"] for request in fake.requests] == [[system, first[0]], [system, *first, second]]
    captured = capsys.readouterr()
    assert captured.out == "Hello\nBye\n"
    assert captured.err.count("\n") == 2 and captured.err.count(", stop]\n") == 2
    assert fake.connections == ["h:1"]


def test_refused_answer_keeps_the_connection_and_shows_in_the_exit_code(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers += [[AnswerError("prompt='9 tokens' is invalid: session_len is 8", None)], deltas("fine")]
    assert run("h:1", "one\n\ntwo\n", monkeypatch) == 1
    assert fake.requests[1]["messages"] == [{"role": "user", "content": "two"}]
    assert fake.connections == ["h:1"]
    captured = capsys.readouterr()
    assert captured.out == "fine\n"
    assert "error: prompt='9 tokens' is invalid: session_len is 8; shorten the question\n" in captured.err


def test_lost_connection_is_made_anew(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers += [[Delta(text="so "), AnswerError("Socket closed", "UNAVAILABLE")], deltas("back")]
    assert run("h:1", "one\n\n/retry\n", monkeypatch) == 1
    assert fake.connections == ["h:1", "h:1"]
    captured = capsys.readouterr()
    assert captured.out == "so \nback\n"
    assert "the connection to h:1 is lost (Socket closed): the next question connects again" in captured.err


def test_a_server_that_is_not_there_is_an_error_before_the_conversation(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match="no server answers at nobody:1"):
        run("nobody:1", "one\n", monkeypatch)
    with pytest.raises(InvalidRequestError, match=r"top_p=2\.0 is invalid"):
        run("h:1 --top-p 2", "one\n", monkeypatch)
    assert fake.connections == []


def test_interrupt_in_a_pipe_ends(fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answers.append([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        run("h:1", "one\n", monkeypatch)


def test_options_reach_the_request(fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answers.append(deltas("x"))
    options = "--max-tokens 5 --temperature 0 --top-p 0.5 --top-k 3 --seed 9 --no-stream --system s"
    assert run(f"h:1 {options}", "hi\n", monkeypatch) == 0
    (request,) = fake.requests
    assert request["options"] == {"max_tokens": 5, "temperature": 0.0, "top_p": 0.5, "top_k": 3, "seed": 9}
    assert request["stream"] is False
    assert request["messages"][0] == {"role": "system", "content": "s"}
