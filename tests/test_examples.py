"""Every example runs, and so do requests in the forms that NVIDIA's load tools send."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc

from tests.server_fixture import assert_accounts, make_workspace, running
from tritonmind_tools.embedded_server import EmbeddedServer

pytestmark = pytest.mark.server

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NUM_TOKENS = 12  # of each request in the files


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def server(workspace: Path) -> Iterator[EmbeddedServer]:
    with running(workspace, http_port=0) as server:
        yield server
    assert_accounts(server.log_path)


def run(name: str, *arguments: str, **environment: str) -> str:
    program = ["bash"] if name.endswith(".sh") else [sys.executable]
    command = [*program, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pipeline(workspace: Path) -> None:
    output = run("pipeline.py", str(workspace))
    assert output.count("answer: ") == 2 and output.count("at once: ") == 2
    assert [line.partition(":")[0] for line in output.splitlines() if re.match("user|assistant", line)] == [
        "user", "assistant", "user", "assistant",
    ]  # fmt: skip


def test_turbomind(workspace: Path) -> None:
    assert run("turbomind.py", str(workspace)).strip()


def test_a_session_over_grpc(server: EmbeddedServer) -> None:
    cached = re.findall(r"\[(\d+) tokens of the prompt were cached\]", run("triton_session.py", server.address))
    assert len(cached) == 2


def test_asyncio_over_grpc(server: EmbeddedServer) -> None:
    lines = run("triton_asyncio.py", server.address)
    for begin in ("The capital of France is", "The largest ocean is", "Water boils at"):
        assert re.search(re.escape(begin) + ".+", lines)


def test_curl_over_http(server: EmbeddedServer) -> None:
    whole, _, streamed = run("triton_generate.sh", f"127.0.0.1:{server.http_port}").partition("\n")
    text = json.loads(whole)["text_output"]
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
    assert text and "".join(event["text_output"] for event in events) == text
    assert len(events) > 1


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of localhost, signed by itself, with its key in the same file."""
    path = tmp_path / "localhost.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run([*command, "-keyout", str(path), "-out", str(tmp_path / "cert")], check=True, capture_output=True)
    path.write_text(path.read_text() + (tmp_path / "cert").read_text())
    return path


def test_openai_client_over_https(workspace: Path, certificate: Path) -> None:
    """The command as a user gives it, until it is told to end, as Docker does."""
    command = [
        sys.executable,
        "-m",
        "tritonmind_tools.cli",
        "serve",
        "api_server",
        str(workspace),
        "--server-port",
        "0",
    ]
    options = ["--server-name", "localhost", "--ssl-certfile", str(certificate), "--engine-options", "num_threads=1"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            lines = iter(server.stdout.readline, "")
            url = next(line.rpartition(" ")[2].strip() for line in lines if "routes at https://" in line)
            output = run("openai_client.py", url, SSL_CERT_FILE=str(certificate))
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 128 + signal.SIGINT
    assert re.search(r"\[\d+ \+ \d+ tokens\]", output)
    assert re.search("city: (Paris|Rome)", output)
    assert len(re.findall(r"^'.*': -?\d", output, re.M)) == 4


def data(name: str) -> list[dict[str, Any]]:
    return list(json.loads((EXAMPLES / "requests" / f"{name}.json").read_text())["data"])


@pytest.mark.parametrize("name", ["genai_perf_vllm", "genai_perf_tensorrtllm", "perf_analyzer"])
def test_requests_of_load_tools_over_grpc(server: EmbeddedServer, name: str) -> None:
    """As perf_analyzer does: what is a tensor of the model is sent as one."""
    with grpc.InferenceServerClient(server.address) as client:
        known = {each.name: each.datatype for each in client.get_model_metadata("tritonmind").inputs}
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error or result))
        for entry in data(name):
            client.async_stream_infer(
                "tritonmind", [as_tensor(known, *field) for field in entry.items() if field[0] in known]
            )
            num_tokens, is_last = 0, False
            while not is_last:
                answer = answers.get(timeout=60)
                assert not isinstance(answer, Exception), answer
                num_tokens += int(answer.as_numpy("num_output_tokens")[0])
                is_last = answer.get_response().parameters["triton_final_response"].bool_param
            assert num_tokens == NUM_TOKENS


def as_tensor(known: dict[str, str], name: str, value: Any) -> grpc.InferInput:
    content, shape = (value["content"], value["shape"]) if isinstance(value, dict) else (value, [len(value)])
    tensor = grpc.InferInput(name, shape, known[name])
    kind = object if known[name] == "BYTES" else {"BOOL": np.bool_, "INT32": np.int32}[known[name]]
    tensor.set_data_from_numpy(np.array(content, dtype=kind).reshape(shape))
    return tensor


def test_requests_of_load_tools_over_http(server: EmbeddedServer) -> None:
    for entry in data("genai_perf_generate"):
        (payload,) = entry["payload"]
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.http_port}/v2/models/tritonmind/generate_stream", json.dumps(payload).encode()
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            events = [
                json.loads(line[6:]) for line in response.read().decode().splitlines() if line.startswith("data: ")
            ]
        assert sum(event["num_output_tokens"] for event in events) == NUM_TOKENS
