"""`tritonmind bench serving`: what clients see is what the endpoint did, on a small endpoint and a real server."""

from __future__ import annotations

import json
import os
import re
import statistics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.server_fixture import make_workspace, need_server

from tritonmind.errors import UnavailableError
from tritonmind_tools.bench import load
from tritonmind_tools.bench.load import LoadResult, poisson
from tritonmind_tools.bench.load_client import Outcome
from tritonmind_tools.bench.serving_rows import Slo, served
from tritonmind_tools.cli import main

FIRST_S, GAP_S = 0.15, 0.05


class Completions(BaseHTTPRequestHandler):
    """`/v1/completions` that streams chunks of two tokens, says so in its usage, and keeps what it was asked."""

    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.num_live += 1
            self.server.most_live = max(self.server.most_live, self.server.num_live)
        try:
            self._answer(body)
        finally:
            with self.server.lock:
                self.server.num_live -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        if self.server.refusal:
            self.send_response(400)
            self.send_header("Content-Length", str(len(self.server.refusal)))
            self.end_headers()
            self.wfile.write(self.server.refusal)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        time.sleep(FIRST_S)
        for count in range(2, body["max_tokens"] + 1, 2):
            usage = {"completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 1}}
            self._send(f"data: {json.dumps({'choices': [{'text': 'a b'}], 'usage': usage})}\n\n")
            time.sleep(GAP_S)
        self._send("data: [DONE]\n\n")
        self._send("")

    def _send(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


class Endpoint(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Completions)
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.refusal = b""
        self.num_live = self.most_live = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_streams_of_an_openai_endpoint(endpoint: Endpoint, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--concurrency", "3", "--rate", "20", "--input-len", "5", "--output-len", "8", "--num-requests", "6"]
    arguments = [*options, "--processes", "2", "--model", "m", "--slo-ttft", "5000", "--json", str(report)]
    assert main(["bench", "serving", endpoint.url, *arguments]) == 0
    results = json.loads(report.read_text())
    closed, open_ = results["rows"]
    assert (closed["workload"], closed["unit"], closed["concurrency"]) == ("server_3_5_8", "tok/s", 3)
    assert (open_["workload"], open_["unit"], open_["rate"]) == ("server_5_8_rate20", "req/s", 20)
    assert closed["value"] == pytest.approx(6 * 8 / closed["wall"]) and closed["wall"] > 2 * (FIRST_S + 3 * GAP_S)
    for row in (closed, open_):
        assert (row["num_requests"], row["num_failed"], row["shape"]) == (6, 0, "m")
        assert row["tokens_per_message"] == 2 and row["prefix_cache_rate"] == pytest.approx(1 / 5)
        assert row["time_to_first_token_p50"] >= FIRST_S and row["latency_p50"] >= FIRST_S + 3 * GAP_S
        assert row["message_gap_p50"] > 0.9 * GAP_S
        assert row["inter_token_p50"] == pytest.approx(row["message_gap_p50"] / 2)
        assert 0 < row["goodput"] == pytest.approx(row["requests_per_second"])
        assert 0 < row["client_cpu"] < 1
    measured = [body for body in endpoint.bodies if body["max_tokens"] == 8]
    assert all(body["stream"] and body["ignore_eos"] and body["temperature"] == 0 for body in measured)
    prompts = {tuple(body["prompt"]) for body in measured}
    assert len(prompts) == len(measured) >= 12, "a prompt came twice"
    assert {len(prompt) for prompt in prompts} == {5}
    assert endpoint.most_live >= 3


def test_a_refusal_is_told_in_the_endpoints_words(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.refusal = b"no ids, please"
    assert main(["bench", "serving", endpoint.url, "--rate", "1", "--processes", "1"]) == 1
    assert "HTTP 400" in (shown := capsys.readouterr().err) and "no ids, please" in shown


def test_ctrl_c_is_for_the_command_and_not_for_its_clients() -> None:
    with load._client() as client:
        assert os.getsid(client.pid) == client.pid
        client.kill()


BAD: list[tuple[list[str], str]] = [
    (["--concurrency", "1"], "--self-host"),
    (["127.0.0.1:1"], "--concurrency"),
    (["http://127.0.0.1:x/v1", "--rate", "1"], "http://HOST:PORT/v1"),
    (["127.0.0.1", "--rate", "1"], "host:port"),
    (["127.0.0.1:1", "--rates", "4,0"], "--rates='4,0'"),
    (["127.0.0.1:1", "--concurrency", "4,8", "--output-len", "1,2,3"], "--output-len='1,2,3'"),
    (["127.0.0.1:1", "--concurrency", "4", "--duration", "3"], "--duration=3"),
    (["127.0.0.1:1", "--rate", "4", "--workload", "mix1000", "--input-len", "3"], "--workload"),
    (["127.0.0.1:1", "--concurrency", "4", "--workload", "nothing"], "nothing"),
    (["127.0.0.1:1", "--rate", "4", "--slo-itl", "-1"], "--slo-itl=-1"),
    (["--self-host", "nowhere", "--concurrency", "4"], "nowhere"),
    (["--self-host", "--concurrency", "4"], "--shape='' must be one of llama2-7b, "),
    (["--self-host", "w", "--shape", "tiny", "--concurrency", "4"], "give one of them"),
    (["--self-host", "w", "--dtype", "int4", "--concurrency", "4"], "--dtype=int4 is for random weights"),
    (["127.0.0.1:1", "--dtype", "fp16", "--concurrency", "4"], "--dtype: for --self-host"),
    (["127.0.0.1:1", "--vocab-size", "3", "--concurrency", "4"], "--vocab-size=3 must be more than 3"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_bad_options(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serving", *arguments]) == 1
    assert named in capsys.readouterr().err


def test_arrivals_are_poisson_and_seeded() -> None:
    lengths = [(number, number) for number in range(1, 2001)]
    arriving = poisson(lengths, 50.0, None, seed=3)
    assert arriving == poisson(lengths, 50.0, None, seed=3) != poisson(lengths, 50.0, None, seed=4)
    assert [(request.prompt_tokens, request.output_tokens) for request in arriving] == lengths
    times = [request.arrival or 0.0 for request in arriving]
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.1)
    some = poisson(lengths[:3], 50.0, 1.0, seed=3)
    assert [request.arrival for request in some] == [moment for moment in times if moment <= 1.0]
    assert [request.prompt_tokens for request in some[:4]] == [1, 2, 3, 1]


def test_served_counts_from_when_a_request_was_due() -> None:
    quick = Outcome(10, 4, due=1.0, sent=1.1, times=[1.5, 1.7], counts=[1, 3], num_tokens=4, num_cached=5)
    slow = Outcome(10, 2, due=2.0, sent=2.0, times=[4.0, 5.0], counts=[1, 1], num_tokens=2)
    failed = Outcome(10, 4, due=2.0, sent=2.0, error="full")
    result = served(LoadResult([quick, slow, failed], [0.1, 0.3]), Slo(1.0, 0.1))
    assert (result.num_requests, result.num_failed, result.first_error, result.num_short) == (3, 1, "full", 0)
    assert result.wall == pytest.approx(4.0)
    assert result.tokens_per_second == pytest.approx(6 / 4) and result.requests_per_second == pytest.approx(2 / 4)
    assert result.goodput == pytest.approx(1 / 4)
    assert result.time_to_first_token.p50 == pytest.approx((0.5 + 2.0) / 2)
    # Three tokens a third of 0.2 s apart, and one after 1 s.
    assert result.inter_token.p50 == pytest.approx(0.2 / 3)
    assert result.message_gap.p50 == pytest.approx(0.6)
    assert result.latency.p50 == pytest.approx((0.7 + 3.0) / 2)
    assert result.prefix_cache_rate == pytest.approx(5 / 20)
    assert result.client_cpu == 0.3
    # From 1.5 on all of the quick one's tokens but the first count, of the slow one's none.
    assert result.sustained == pytest.approx(3 / 4 / 0.5)
    with pytest.raises(UnavailableError, match="full"):
        served(LoadResult([failed], [0.1]), Slo())


def test_answers_of_a_single_message_have_no_time_between_tokens() -> None:
    whole = Outcome(10, 3, due=1.0, sent=1.0, times=[3.0], counts=[3], num_tokens=3)
    one = Outcome(10, 1, due=2.0, sent=2.0, times=[3.0], counts=[1], num_tokens=1)
    result = served(LoadResult([whole, one], [0.1]), Slo(1.5, 0.1))
    assert result.inter_token.p99 == result.message_gap.p99 == 0
    assert (result.latency.p99, result.goodput) == (pytest.approx(1.99), pytest.approx(1 / 2))


@pytest.mark.server
@pytest.mark.parametrize(("given", "front_end"), [(True, "triton"), (False, "api_server")])
def test_self_host_compares_the_server_with_the_bare_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: bool, front_end: str
) -> None:
    if front_end == "triton":
        need_server()
    report = tmp_path / "report.json"
    # A workspace has num_threads from its own config.pbtxt.
    random = ["--shape", "tiny", "--dtype", "int4", "--engine-options", "num_threads=1"]
    what = [str(make_workspace(tmp_path))] if given else random
    options = ["--concurrency", "3", "--input-len", "9", "--output-len", "12", "--rounds", "1", "--processes", "2"]
    engine = ["--max-batch", "4", "--engine-options", "session_len=64"]
    what += ["--front-end", front_end]
    assert main(["bench", "serving", "--self-host", *what, *options, *engine, "--json", str(report)]) == 0
    results = json.loads(report.read_text())
    server, bare = results["rows"]
    assert (server["workload"], bare["workload"]) == ("server_3_9_12", "batch3_9_12")
    assert (server["engine"], bare["engine"]) == ("server", "bare engine")
    assert server["ratio_to_engine"] == pytest.approx(server["value"] / bare["value"])
    assert {row["shape"] for row in results["rows"]} == {"tiny"} and server["precision"] == bare["precision"] == "fp32"
    assert server["num_failed"] == 0 and server["prefix_cache_rate"] == 0
    for setting in ("num_threads=1", "max_num_seqs=4", "max_model_len=64", "enable_prefix_caching=False"):
        assert setting in results["notes"]["settings"]
    assert re.search(r"server_3_9_12 +\d+ +\d+ +\d+\.\d%", capsys.readouterr().out)
