"""The way to an OpenAI API server, against one that answers as it is told to; a real one is in test_real_clients.py."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tritonmind.errors import ConfigError, TritonmindError, UnavailableError
from tritonmind_tools.api_client import ApiServer, ApiTransport
from tritonmind_tools.console_transport import Delta, is_too_long, statistics

QUESTION = [{"role": "user", "content": "hi"}]
MODELS = json.dumps({"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]})


def chunk(text: str = "", *, finish_reason: str | None = None, **delta: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text, **delta}, "finish_reason": finish_reason}
    return event({"object": "chat.completion.chunk", "choices": [choice], "usage": None})


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
USAGE = event(
    {
        "choices": [],
        "usage": {"prompt_tokens": 30, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 20}},
    }
)


class Fake(ThreadingHTTPServer):
    """answers: for each POST its status, content type and parts; a number among the parts waits so many seconds."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answers: list[tuple[int, str, list[bytes | float]]] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = MODELS
        self.left = threading.Event()  # somebody closed the connection before the answer's end
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stream(self, *parts: bytes | float) -> None:
        self.answers.append((200, "text/event-stream", list(parts)))

    def refuse(self, status: int, body: str) -> None:
        self.answers.append((status, "application/json", [body.encode()]))

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        found = self.path == "/v1/models"
        self._answer(200 if found else 404, "application/json", [self.server.models.encode() if found else b"{}"])

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(*self.server.answers.pop(0))

    def _answer(self, status: int, kind: str, parts: list[bytes | float]) -> None:
        self.connection.settimeout(0.02)
        for number, part in enumerate([b"", *parts]):
            if isinstance(part, float):
                self._wait(part)
                continue
            if number == 0 and parts and isinstance(parts[0], float):
                continue  # not even the status comes at once
            if not getattr(self, "begun", False):
                self.begun = True
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.end_headers()
            self.wfile.write(part)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.connection.recv(1) == b"":
                    self.server.left.set()
                    return
            except TimeoutError:
                pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.stop()


def connect(fake: Fake) -> ApiTransport:
    return ApiServer(fake.url).connect()


def ask(fake: Fake) -> list[Delta]:
    return list(connect(fake).stream(QUESTION, {}))


def test_an_answer_with_what_the_server_counted(fake: Fake) -> None:
    # A line separator of Unicode, a carriage return, a comment: none of them ends an event.
    fake.stream(b": hello\r\n\r\n", chunk(role="assistant"), chunk("a\u2028b"), chunk("c\n"))
    fake.answers[-1][2].extend([chunk(finish_reason="length").replace(b"\n", b"\r\n"), USAGE, DONE])
    transport = connect(fake)
    assert transport.title == f"tiny at {fake.url}"
    options = {"temperature": 0.5, "stop": ("x",), "include_stop": True, "logit_bias": {3: -1.5}}
    deltas = list(transport.stream(QUESTION, options))
    assert [delta.text for delta in deltas] == ["a\u2028b", "c\n", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
    line = statistics([(float(number), delta) for number, delta in enumerate(deltas)])
    assert line == "[prompt 30 tokens, 20 cached, answer 9 tokens, 4.0 tok/s, first after 0.00 s, length]"
    assert fake.bodies == [
        {
            "model": "tiny",
            "messages": QUESTION,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "stop": ["x"],
            "include_stop_str_in_output": True,
            "logit_bias": {"3": -1.5},
        }
    ]


def test_reasoning_stands_where_the_model_wrote_it(fake: Fake) -> None:
    fake.stream(
        chunk(reasoning_content="Hm"), chunk(reasoning_content="m."), chunk("Four."), chunk(finish_reason="stop")
    )
    assert "".join(delta.text for delta in ask(fake)) == "<think>\nHmm.\n</think>\n\nFour."
    fake.stream(chunk(reasoning_content="Hm"), chunk(finish_reason="length"), DONE)
    assert "".join(delta.text for delta in ask(fake)) == "<think>\nHm\n</think>\n\n"


def test_key_and_model(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.stream(chunk("x", finish_reason="stop"), DONE)
    transport = ApiServer(f"{fake.url}/v1/", api_key="secret", model="other").connect()
    assert "".join(delta.text for delta in transport.stream(QUESTION, {})) == "x"
    assert fake.bodies[0]["model"] == "other" and set(fake.keys) == {"Bearer secret"}
    with pytest.raises(ConfigError, match="has no model 'third'; it has tiny, other"):
        ApiServer(fake.url, model="third").connect()


@pytest.mark.parametrize("url", ["localhost:23333", "ftp://h", "http://", "http://h:port", ""])
def test_a_malformed_url_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match=f"url {url!r} "):
        ApiServer(url)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, '{"error": {"message": "top_p must be at most 1", "code": null}}', r"^top_p must be at most 1$"),
        (
            401,
            '{"error": {"message": "no key"}}',
            r"^no key \(give the server's key with --api-key ",
        ),
        (429, '{"error": "busy"}', "^busy$"),
        (422, '{"detail": "nonsense"}', "^nonsense$"),
        (502, "<html>", "is no OpenAI API server: HTTP status 502"),
        (200, '{"choices": []}', "is no OpenAI API server: .*text/event-stream"),
    ],
)
def test_a_refusal_in_the_servers_words(fake: Fake, status: int, body: str, message: str) -> None:
    fake.refuse(status, body)
    with pytest.raises(TritonmindError, match=message):
        ask(fake)


def test_a_prompt_too_long_is_known_by_its_words(fake: Fake) -> None:
    fake.refuse(400, '{"error": {"message": "This model\'s maximum context length is 8 tokens", "code": "x"}}')
    with pytest.raises(TritonmindError) as caught:
        ask(fake)
    assert is_too_long(caught.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([chunk("begun"), event({"error": {"message": "the engine failed"}})], "^the engine failed$"),
        ([chunk("begun")], "is lost in the middle of an answer: the next question connects again"),
        ([b"data: no json\n\n"], "is no OpenAI API server: JSONDecodeError"),
        ([b"data: [1]\n\n"], "is no OpenAI API server"),
        ([event({"object": "x"})], "is no OpenAI API server: KeyError"),
    ],
)
def test_a_stream_that_ends_badly(fake: Fake, parts: list[bytes], message: str) -> None:
    fake.stream(*parts)
    with pytest.raises(TritonmindError, match=message):
        ask(fake)


@pytest.mark.parametrize("models", ["<html>", "[]", "{}", '{"data": []}', '{"data": [1]}'])
def test_what_lists_no_models_is_no_api_server(fake: Fake, models: str) -> None:
    fake.models = models
    with pytest.raises(UnavailableError, match=f"what answers at {fake.url} is no OpenAI API server"):
        ApiServer(fake.url).connect()
    assert not ApiServer(fake.url).status().is_ready


def test_a_lost_server_is_named_and_found_again(fake: Fake) -> None:
    source = ApiServer(fake.url)
    transport = source.connect()
    assert source.status().is_ready and source.status().text == f"tiny, API server {fake.url}"
    port = fake.server_address[1]
    fake.stop()
    for _ in range(2):
        with pytest.raises(UnavailableError, match=re.escape(f"no API server answers at {fake.url}")):
            list(transport.stream(QUESTION, {}))
    status = source.status()
    assert not status.is_ready and "is it started, is this its port?" in status.text
    again = Fake(port)
    try:
        again.stream(chunk("back", finish_reason="stop"), DONE)
        assert "".join(delta.text for delta in transport.stream(QUESTION, {})) == "back"
    finally:
        again.stop()


@pytest.mark.parametrize("parts", [[30.0], [chunk("begun"), 30.0]])
def test_a_cancel_is_immediate_and_closes_the_connection(fake: Fake, parts: list[bytes | float]) -> None:
    fake.stream(*parts)
    transport = connect(fake)
    deltas = transport.stream(QUESTION, {})
    if len(parts) > 1:
        assert next(deltas).text == "begun"
    threading.Timer(0.3, transport.cancel).start()
    begin = time.monotonic()
    assert next(deltas).finish_reason == "cancelled"
    assert time.monotonic() - begin < 10
    assert list(deltas) == []
    assert fake.left.wait(10)


def test_leaving_early_closes_the_connection(fake: Fake) -> None:
    fake.stream(chunk("begun"), 30.0)
    deltas = connect(fake).stream(QUESTION, {})
    next(deltas)
    deltas.close()
    assert fake.left.wait(10)


def test_a_port_that_speaks_something_else() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def answer() -> None:
            connection, _ = other.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=f"no API server answers at {url}"):
            ApiServer(url).connect()
