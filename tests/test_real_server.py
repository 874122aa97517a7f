"""The whole path through a real Triton server: gRPC, stub, adapter, engine process, and back."""

from __future__ import annotations

import json
import queue
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server_fixture import assert_accounts, kill_engine, make_workspace, running, session_processes
from tritonmind.tokenizer import Tokenizer
from tritonmind_tools.embedded_server import EmbeddedServer
from tritonmind_tools.triton_client import AnswerError, Delta, TritonClient

pytestmark = pytest.mark.server

GREEDY = {"temperature": 0, "ignore_eos": True}
ENDLESS = {**GREEDY, "max_tokens": 4000}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(workspace: Path) -> Iterator[EmbeddedServer]:
    with running(workspace, http_port=0) as server:
        yield server
    assert_accounts(server.log_path)


@pytest.fixture(scope="module")
def tokenizer(workspace: Path) -> Tokenizer:
    return Tokenizer.from_dir(workspace / "triton_models" / "tokenizer")


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[TritonClient]:
    with TritonClient(server.address) as client:
        yield client


def answer(address: str, **request: Any) -> list[Delta]:
    with TritonClient(address) as client:
        return list(client.generate(**request))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_stream_and_single_response_agree(client: TritonClient, tokenizer: Tokenizer) -> None:
    options = {**GREEDY, "max_tokens": 40}
    deltas = list(client.generate(text="The capital of France", options=options))
    (whole,) = client.generate(text="The capital of France", stream=False, options=options)
    assert len(deltas) > 1
    assert text_of(deltas) == whole.text
    ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert ids == whole.token_ids
    assert len(ids) == sum(delta.num_tokens for delta in deltas) == whole.num_tokens == 40
    assert whole.text == tokenizer.decode(ids)
    assert whole.finish_reason == deltas[-1].finish_reason == "length"
    prompt = tokenizer.encode_prompt("The capital of France")
    assert whole.num_input_tokens == len(prompt)
    (same,) = client.generate(input_ids=prompt, stream=False, options=options)
    assert same.token_ids == ids


def test_messages(client: TritonClient, tokenizer: Tokenizer) -> None:
    (delta,) = client.generate(
        messages=[{"role": "user", "content": "hi"}], stream=False, options={**GREEDY, "max_tokens": 3}
    )
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert delta.num_input_tokens == len(tokenizer.encode(text, add_special_tokens=False))


def test_stop_string(client: TritonClient) -> None:
    (whole,) = client.generate(text="stop here", stream=False, options={**GREEDY, "max_tokens": 40})
    position, stop = next(
        (i, character) for i, character in enumerate(whole.text) if i > 4 and character not in whole.text[:i] + "\ufffd"
    )
    deltas = list(client.generate(text="stop here", options={**GREEDY, "max_tokens": 40, "stop": [stop]}))
    assert text_of(deltas) == whole.text[:position]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)


def test_cached_prefix_is_reported(client: TritonClient) -> None:
    prefix = "A prefix that two requests share. " * 30
    first, second = (
        list(client.generate(text=prefix + end, options={**GREEDY, "max_tokens": 2}))[-1] for end in ("one", "two")
    )
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens > second.num_input_tokens / 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"text": ""}, "text_input"),
    ({"text": "word " * 5000}, "session_len is 4096"),
    ({"input_ids": [1, 10**6]}, "input_ids=1000000"),
    ({"text": "a", "options": {"temperature": -1}}, "temperature"),
    ({"text": "a", "options": {"temprature": 1}}, "temprature"),
    ({"text": "a", "options": {"response_format": {"type": "regex", "regex": "(a"}}}, "unclosed group"),
    ({"text": "a", "input_ids": [1]}, "exactly one of"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
]


@pytest.mark.parametrize(("request_", "named"), BAD)
def test_bad_request_then_good_one(server: EmbeddedServer, request_: dict[str, Any], named: str) -> None:
    """That the code is INVALID_ARG is for tests/backend: asking this server for a gRPC status may crash it."""
    with TritonClient(server.address) as client, pytest.raises(AnswerError) as caught:
        list(client.generate(**request_))
    assert named in str(caught.value)
    (delta,) = answer(server.address, text="good", stream=False, options={**GREEDY, "max_tokens": 2})
    assert delta.num_tokens == 2


def test_cancel(client: TritonClient) -> None:
    answers = client.generate(text="long", options=ENDLESS)
    assert next(answers).finish_reason is None
    client.cancel()
    begin = time.monotonic()
    assert [delta.finish_reason for delta in answers][-1] == "cancelled"
    assert time.monotonic() - begin < 2


def test_concurrent_streams_are_those_of_single_runs(server: EmbeddedServer) -> None:
    """32 streams of mixed lengths, a quarter cancelled on the way; the rest must be untouched by the others."""
    requests: list[dict[str, Any]] = [
        {"text": f"Prompt number {i} " * (1 + i % 7), "options": {**GREEDY, "max_tokens": 5 + 3 * (i % 11)}}
        for i in range(32)
    ]
    alone = [text_of(answer(server.address, **request)) for request in requests]
    cancelled = set(random.sample(range(32), 8))

    def one(index: int) -> str | None:
        with TritonClient(server.address) as client:
            if index not in cancelled:
                return text_of(list(client.generate(**requests[index])))
            answers = client.generate(text=requests[index]["text"], options=ENDLESS)
            for _ in range(random.randrange(1, 5)):
                next(answers)
            answers.close()
            return None

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(one, range(32)))
    for index, text in enumerate(together):
        assert index in cancelled or text == alone[index], index


def test_generate_endpoint(server: EmbeddedServer) -> None:
    """Typed inputs as JSON fields, parameters, and an error as HTTP 400 that names the field."""
    url = f"http://127.0.0.1:{server.http_port}/v2/models/tritonmind/generate"

    def post(body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as response:
            return json.loads(response.read())

    body = {"text_input": "a", "max_tokens": 3, "temperature": 0, "ignore_eos": True, "stop": ["@@", "##"], "id": "7"}
    reply = post(body)
    assert reply["num_output_tokens"] == 3
    assert reply["text_output"] == post({**body, "stop": []})["text_output"]
    for bad, named in (({"temperature": -1}, "temperature"), ({"temprature": 1}, "temprature")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post({**body, **bad})
        assert caught.value.code == 400
        assert named in caught.value.read().decode()


def test_batch_dimension(tmp_path: Path) -> None:
    """The OpenAI front end's default format: shapes [1, 1], through nothing but tritonclient."""
    from tritonclient import grpc

    with running(make_workspace(tmp_path, "--triton-batch-dim")) as server:
        inputs = []
        for name, kind, array in (
            ("text_input", "BYTES", np.array([[b"hello"]], dtype=np.object_)),
            ("max_tokens", "INT32", np.array([[4]], dtype=np.int32)),
            ("stop_words", "BYTES", np.array([[b"@@", b"##"]], dtype=np.object_)),
            ("ignore_eos", "BOOL", np.array([[True]])),
        ):
            inputs.append(grpc.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array)
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with grpc.InferenceServerClient(server.address) as client:
            client.start_stream(lambda result, error: results.put(error or result))
            client.async_stream_infer("tritonmind", inputs)
            result = results.get(timeout=30)
            client.stop_stream()
        assert results.empty()
        assert result.as_numpy("text_output").shape == (1, 1)
        assert result.as_numpy("token_ids").shape == (1, 4)
    assert_accounts(server.log_path, num_requests=1)


def test_killed_engine_and_stop_under_load(workspace: Path) -> None:
    with running(workspace) as server:
        session = server.pid

        def until_error(index: int) -> AnswerError:
            with pytest.raises(AnswerError) as caught:
                answer(server.address, text=f"stream {index}", options=ENDLESS)
            return caught.value

        with ThreadPoolExecutor(8) as pool:
            errors = [pool.submit(until_error, index) for index in range(8)]
            time.sleep(1)
            kill_engine(server)
            killed = time.monotonic()
            for error in errors:
                assert "signal 9" in str(error.result(timeout=10))
            assert time.monotonic() - killed < 2

            deadline = time.monotonic() + 60
            while True:
                try:
                    (delta,) = answer(server.address, text="again", stream=False, options={**GREEDY, "max_tokens": 3})
                    break
                except AnswerError as refusal:
                    assert "engine is down" in str(refusal)
                    assert time.monotonic() < deadline, "the engine did not come back"
                    time.sleep(0.2)
            assert delta.num_tokens == 3

            errors = [pool.submit(until_error, index) for index in range(8)]
            time.sleep(1)
            begin = time.monotonic()
            server.stop()
            assert time.monotonic() - begin < 8.5, "the server had to be killed"
            for error in errors:
                assert "being unloaded" in str(error.result(timeout=10))
        deadline = time.monotonic() + 5
        while session_processes(session) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not session_processes(session), "processes were left behind"
    assert_accounts(server.log_path)
