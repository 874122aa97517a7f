"""The console client without a server: addresses, refusals, the conversation. test_real_server.py has the rest."""

from __future__ import annotations

import argparse
import io
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from tritonmind.errors import ConfigError, UnavailableError
from tritonmind_tools import triton_client
from tritonmind_tools.triton_client import AnswerError, Chat, Delta, TritonClient, parse_address


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
    """Answers with prepared deltas, or raises."""

    def __init__(self, *answers: list[Delta | BaseException]) -> None:
        self.answers = list(answers)
        self.seen: list[list[Mapping[str, str]]] = []

    def generate(self, *, messages: Sequence[Mapping[str, str]], **others: Any) -> Iterator[Delta]:
        self.seen.append(list(messages))
        for item in self.answers.pop(0):
            if isinstance(item, BaseException):
                raise item
            yield item


def deltas(*texts: str) -> list[Delta | BaseException]:
    last = len(texts) - 1
    return [
        Delta(text=text, num_tokens=1, finish_reason="stop" if index == last else None)
        for index, text in enumerate(texts)
    ]


def chat(client: FakeClient, *, interactive: bool = False, system: str | None = None) -> Chat:
    return Chat(client, system=system, stream=True, options={}, interactive=interactive)  # type: ignore[arg-type]


def test_conversation_keeps_its_history(capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient(deltas("Hel", "lo"), deltas("Bye"))
    conversation = chat(client, system="Be brief.")
    assert conversation.run(io.StringIO("hi\n\n  \nand then\nexit\nnever\n")) == 0
    system = {"role": "system", "content": "Be brief."}
    first = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}]
    assert client.seen == [[system, first[0]], [system, *first, {"role": "user", "content": "and then"}]]
    captured = capsys.readouterr()
    assert captured.out == "Hello\nBye\n"
    assert captured.err.count("\n") == 2
    assert captured.err.startswith("[2 tokens, ")
    assert captured.err.rstrip().endswith(", stop]")


def test_failed_answer_is_not_history_and_shows_in_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient([AnswerError("top_p=2.0 is invalid", "INVALID_ARGUMENT")], deltas("fine"))
    assert chat(client).run(io.StringIO("one\ntwo\n")) == 1
    assert client.seen[1] == [{"role": "user", "content": "two"}]
    captured = capsys.readouterr()
    assert captured.out == "fine\n"
    assert "error: top_p=2.0 is invalid\n" in captured.err


def test_interrupted_answer_stays_as_far_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient([Delta(text="So far"), KeyboardInterrupt()], deltas("more"))
    conversation = chat(client, interactive=True)
    assert conversation.run(io.StringIO("one\ntwo\n")) == 0
    assert client.seen[1][1] == {"role": "assistant", "content": "So far"}
    assert "cancelled]" in capsys.readouterr().out


def test_interrupt_in_a_pipe_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        chat(FakeClient([KeyboardInterrupt()])).run(io.StringIO("one\n"))


def test_options_reach_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    triton_client.register(parser.add_subparsers())
    options = "--max-tokens 5 --temperature 0 --top-p 0.5 --top-k 3 --seed 9 --no-stream --system s"
    args = parser.parse_args(["triton_client", "h:1", *options.split()])
    seen: dict[str, Any] = {}

    class Recorder(FakeClient):
        def __init__(self, address: str) -> None:
            super().__init__(deltas("x"))
            seen["address"] = address

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def generate(self, **given: Any) -> Iterator[Delta]:
            seen.update(given)
            return super().generate(**given)

    monkeypatch.setattr(triton_client, "TritonClient", Recorder)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert args.run(args) == 0
    assert seen["address"] == "h:1"
    assert seen["options"] == {"max_tokens": 5, "temperature": 0.0, "top_p": 0.5, "top_k": 3, "seed": 9}
    assert seen["stream"] is False
    assert seen["messages"][0] == {"role": "system", "content": "s"}
