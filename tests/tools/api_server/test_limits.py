"""Who may call, how much, and what happens when a client goes or does not read."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from typing import Any

import httpx
import pytest
from tests.tools.api_server.scripted import ScriptedBackend, app_of, running, words
from tests.tools.api_server.test_wire import chat

from tritonmind_tools.api_server.prometheus import Registry
from tritonmind_tools.cli import main

CHAT = "/v1/chat/completions"
LONG_S = 60.0
PAGE_FILES = ("favicon.png", "swagger-ui-bundle.js", "swagger-ui.css")


def asked(url: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which a chat was asked for."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def requests(
    *calls: tuple[str, str, dict[str, Any]], backend: ScriptedBackend | None = None, **settings: Any
) -> list[Any]:
    async def run() -> list[httpx.Response]:
        app = app_of(backend or ScriptedBackend(lambda request: words("ok")), **settings)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [await client.request(method, path, **options) for method, path, options in calls]

    return asyncio.run(run())


def test_a_key_is_asked_for_where_there_are_keys() -> None:
    def call(path: str, **headers: str) -> tuple[str, str, dict[str, Any]]:
        return ("GET", path, {"headers": headers})

    answers = requests(
        call("/v1/models"),
        call("/v1/models", authorization="Bearer wrong"),
        call("/v1/models", authorization="Basic second"),
        call("/v1/models", authorization="Bearer second"),
        call("/metrics"),
        call("/health"),
        call("/"),
        api_keys=("first", "second"),
    )
    assert [answer.status_code for answer in answers] == [401, 401, 401, 200, 401, 200, 200]
    assert answers[0].json()["error"]["code"] == "invalid_api_key"
    assert answers[0].headers["www-authenticate"] == "Bearer"


def test_a_large_body_is_refused_whether_it_says_its_size_or_not() -> None:
    async def pieces() -> Any:
        for _ in range(4):
            yield b" " * 300

    large = ("POST", CHAT, {"content": b" " * 1001})
    chunked = ("POST", CHAT, {"content": pieces()})
    fitting = ("POST", CHAT, {"json": chat()})
    answers = requests(large, chunked, fitting, max_body_bytes=1000)
    assert [answer.status_code for answer in answers] == [413, 413, 200]
    assert answers[1].json()["error"]["code"] == "request_too_large"


def test_cors_is_off_until_it_is_asked_for() -> None:
    ask = ("OPTIONS", CHAT, {"headers": {"origin": "http://page", "access-control-request-method": "POST"}})
    (off,) = requests(ask)
    (on,) = requests(ask, allow_origins=("http://page",), api_keys=("key",))
    assert "access-control-allow-origin" not in off.headers
    assert on.status_code == 200 and on.headers["access-control-allow-origin"] == "http://page"


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
def test_health_says_when_the_model_cannot_answer(ready: bool, status: int) -> None:
    """To load balancers that send HEAD too."""
    backend = ScriptedBackend(lambda request: [], ready=ready)
    answers = requests(("GET", "/health", {}), ("HEAD", "/health", {}), backend=backend)
    assert [answer.status_code for answer in answers] == [status, status]


def test_swagger_is_at_the_root_as_in_the_tutorial() -> None:
    """Beside a server that has no way to other hosts too, and to one without a key."""
    paths = ["/", "/docs", "/openapi.json", *(f"/page-files/{name}" for name in PAGE_FILES)]
    root, docs, description, *files = requests(*(("GET", path, {}) for path in paths), api_keys=("key",))
    assert "swagger-ui" in root.text and root.text == docs.text
    assert sorted(re.findall('(?:src|href)="(.*?)"', root.text)) == paths[3:]
    assert all(file.status_code == 200 and len(file.content) > 1000 for file in files)
    assert CHAT in description.json()["paths"]
    responses = description.json()["paths"][CHAT]["post"]["responses"]
    assert "400" in responses and "422" not in responses


def test_only_so_many_requests_are_at_work() -> None:
    backend = ScriptedBackend(lambda request: [*words("a", "b")[:1], LONG_S])
    with running(app_of(backend, max_requests=1)) as url, httpx.Client(base_url=url, timeout=30) as client:
        with client.stream("POST", CHAT, json=chat(stream=True)) as first:
            lines = first.iter_lines()  # kept: its end would be the answer's
            next(lines)
            refused = client.post(CHAT, json=chat())
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert client.get("/health").status_code == 200
        assert backend.closed_early.wait(10)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_noticed_at_once(stream: bool) -> None:
    backend = ScriptedBackend(lambda request: [*words("a", "b")[:1], LONG_S])
    with running(app_of(backend)) as url:
        with asked(url, chat(stream=stream)) as connection:
            if stream:
                assert connection.recv(100)
            while not backend.requests:
                time.sleep(0.005)
        left = time.monotonic()
        assert backend.closed_early.wait(10)
        assert time.monotonic() - left < 0.1 * 10  # 100 ms, on a machine that does ten things at once


def test_a_client_that_never_reads_is_dropped() -> None:
    piece = words("x" * 10_000, "")[0]
    backend = ScriptedBackend(lambda request: [item for _ in range(10_000) for item in (piece, 0)])
    with running(app_of(backend), client_timeout=1.0) as url, asked(url, chat(stream=True)):
        assert backend.closed_early.wait(60)


def test_metrics_are_written_as_prometheus_reads_them() -> None:
    registry = Registry()
    counter = registry(name="a_total", description="A", kind=registry.COUNTER).Metric(labels={"model": 'm"\n'})
    histogram = registry(name="b", description="B", kind=registry.HISTOGRAM).Metric(labels={}, buckets=[1, 2])
    counter.increment(12_345_678)
    for value in (0.5, 1, 3):
        histogram.observe(value)
    assert registry.text() == (
        '# HELP a_total A\n# TYPE a_total counter\na_total{model="m\\"\\n"} 12345678\n# HELP b B\n# TYPE b histogram\n'
        'b_bucket{le="1"} 2\nb_bucket{le="2"} 2\nb_bucket{le="+Inf"} 3\nb_sum{} 4.5\nb_count{} 3\n'
    ).replace("{}", "")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["missing", "--max-body-size", "0"], "--max-body-size=0"),
        (["missing", "--max-concurrent-requests", "-1"], "--max-concurrent-requests=-1"),
        (["missing", "--api-key", " "], "--api-key"),
        (["missing", "--server-port", "99999"], "--server-port=99999"),
        (["missing", "--ssl-keyfile", "x"], "--ssl-keyfile"),
        (["missing", "--ssl-certfile", "x"], "--ssl-certfile=x"),
        (["missing", "--allow-origins", "*", "--allow-credentials"], "--allow-credentials"),
        (["missing", "--server-port", "0"], "missing does not exist"),
        (["127.0.0.1:1", "--server-port", "0", "--instance_num", "64"], "--instance-num"),
        (["127.0.0.1:1", "--server-port", "0"], "127.0.0.1:1"),
    ],
)
def test_wrong_options_are_named(options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "api_server", *options]) == 1
    assert named in capsys.readouterr().err


def test_a_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "api_server", "missing", "--server-port", str(port)]) == 1
        assert f"port {port} is taken" in capsys.readouterr().err
