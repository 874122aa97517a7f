"""Sessions, orders, deadlines and metrics through the real Triton server."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server_fixture import assert_accounts, kill_engine, make_workspace, running
from tritonmind.tokenizer import Tokenizer
from tritonmind_tools.embedded_server import EmbeddedServer

pytestmark = pytest.mark.server

GREEDY = {"temperature": 0}
ENDLESS = {"sampling_parameters": json.dumps({**GREEDY, "ignore_eos": True, "max_tokens": 4000})}
TYPES = {"session_id": np.uint64, "step": np.int32, "input_ids": np.int32, "priority": np.int32, "timeout_ms": np.int32}
SYSTEM = "You answer in a short sentence. " * 17


@dataclass
class Reply:
    """One request's answer, or the error that ended it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str = ""
    stop_reason: str = ""
    error: str = ""


class Exchange:
    """A request on a gRPC stream of its own, sent at once; `reply` waits for its answer."""

    def __init__(self, address: str, *, request_id: str = "", timeout: int | None = None, **tensors: Any) -> None:
        from tritonclient import grpc

        inputs = []
        for name, given in tensors.items():
            values = given if isinstance(given, list) else [given]
            texts = isinstance(values[0], str)
            data = [value.encode() for value in values] if texts else values
            array = np.array(data, dtype=np.object_ if texts else TYPES.get(name, np.bool_))
            kind = "BYTES" if texts else {np.bool_: "BOOL"}.get(array.dtype.type, array.dtype.name.upper())
            inputs.append(grpc.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array)
        self._events: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._client = grpc.InferenceServerClient(address)
        self._client.start_stream(lambda result, error: self._events.put((result, error)))
        self._client.async_stream_infer(
            "tritonmind", inputs, request_id=request_id, timeout=timeout, enable_empty_final_response=True
        )
        self._reply = Reply()

    def first(self) -> None:
        """Wait for a response that is not the last."""
        assert not self._take(), self._reply

    def reply(self) -> Reply:
        while not self._take():
            pass
        self._client.stop_stream()
        self._client.close()
        return self._reply

    def _take(self) -> bool:
        result, error = self._events.get(timeout=60)
        if error is not None:
            self._reply.error = error.message()
            return True

        def values(name: str) -> list[Any]:
            return result.as_numpy(name).reshape(-1).tolist()

        self._reply.text += b"".join(values("text_output")).decode()
        self._reply.token_ids += values("token_ids")
        (self._reply.num_input_tokens,) = values("num_input_tokens")
        (self._reply.num_cached_tokens,) = values("num_cached_tokens")
        self._reply.finish_reason = values("finish_reason")[0].decode()
        self._reply.stop_reason = values("stop_reason")[0].decode()
        return bool(result.get_response().parameters["triton_final_response"].bool_param)


def ask(server: EmbeddedServer, **request: Any) -> Reply:
    return Exchange(server.address, **request).reply()


def metrics(server: EmbeddedServer) -> dict[str, float]:
    """The server's metrics that carry our labels, by name and other labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = {}
    for name, labels, number in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        if 'model="tritonmind"' in labels and name.startswith(("tritonmind_", "nv_trt_llm_")):
            others = [label for label in labels.split(",") if not label.startswith(("model=", "version="))]
            found[name + "{" + ",".join(others) + "}" if others else name] = float(number)
    return found


def settled_metrics(server: EmbeddedServer) -> dict[str, float]:
    """The metrics once everything that was counted is written, which happens every quarter of a second."""
    seen: dict[str, float] = {}
    while (now := metrics(server)) != seen:
        seen = now
        time.sleep(0.6)
    return seen


def eventually_metric(server: EmbeddedServer, name: str, expected: float) -> None:
    deadline = time.monotonic() + 30
    while (seen := metrics(server)).get(name) != expected:
        assert time.monotonic() < deadline, (name, expected, seen)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    workspace = make_workspace(tmp_path_factory.mktemp("served"))
    with running(workspace, http_port=0, metrics_port=0) as server:
        yield server
    assert_accounts(server.log_path)


def test_session_stop_and_cancel(server: EmbeddedServer) -> None:
    turn = Exchange(server.address, text_input="a", stream=True, session_id=2**63, sequence_start=True, **ENDLESS)
    turn.first()
    assert "busy" in ask(server, text_input="b", session_id=2**63).error
    begin = time.monotonic()
    assert ask(server, session_id=2**63, session_stop=True).stop_reason == f"session {2**63}: interrupted"
    stopped = turn.reply()
    assert time.monotonic() - begin < 2
    assert (stopped.finish_reason, stopped.error) == ("cancelled", "")
    after = ask(server, text_input="b", session_id=2**63, sampling_parameters='{"max_tokens": 2}')
    assert after.num_input_tokens == stopped.num_input_tokens + len(stopped.token_ids) + 1

    long = Exchange(server.address, text_input="c", stream=True, request_id="mine", **ENDLESS)
    long.first()
    assert ask(server, cancel=True, request_id="mine").stop_reason == "request 'mine': cancelled"
    assert long.reply().finish_reason == "cancelled"
    assert "no live request has the id 'mine'" in ask(server, cancel=True, request_id="mine").error
    assert "session expired" in ask(server, text_input="b", session_id=3).error


def test_deadlines_of_grpc_and_of_the_generate_endpoint(server: EmbeddedServer) -> None:
    for limit in ({"timeout_ms": 300}, {"timeout": 300_000}):
        begin = time.monotonic()
        late = ask(server, text_input="a", stream=True, **limit, **ENDLESS)
        assert late.error.endswith("deadline exceeded after 300 ms")
        assert late.token_ids, "what was sent before stays"
        assert 0.25 < time.monotonic() - begin < 2
    body = {"text_input": "a", "max_tokens": 4000, "ignore_eos": True, "timeout": 300_000, "priority": 1}
    url = f"http://127.0.0.1:{server.http_port}/v2/models/tritonmind/generate"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=30)
    assert b"deadline exceeded after 300 ms" in caught.value.read()


def test_metrics_are_the_client_s_own_count(server: EmbeddedServer) -> None:
    before = settled_metrics(server)
    prompt = "A prompt that many send. " * 20
    options = {"sampling_parameters": json.dumps({**GREEDY, "ignore_eos": True, "max_tokens": 7})}
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: ask(server, text_input=prompt, stream=True, **options), range(24)))
    seen = settled_metrics(server)

    def grown(name: str) -> float:
        return seen[name] - before[name]

    assert grown('tritonmind_requests_finished_total{reason="length"}') == 24
    assert grown("tritonmind_generated_tokens_total") == sum(len(reply.token_ids) for reply in replies) == 24 * 7
    assert grown("tritonmind_prompt_tokens_total") == sum(reply.num_input_tokens for reply in replies)
    cached = sum(reply.num_cached_tokens for reply in replies)
    assert grown("tritonmind_prefix_cache_hit_tokens_total") == cached > 0
    for name in ("queue_time", "time_to_first_token", "inter_token_latency", "request_duration"):
        assert grown(f"tritonmind_{name}_seconds_count") == 24
        assert grown(f"tritonmind_{name}_seconds_sum") > 0
    blocks = {state: seen[f'tritonmind_kv_blocks{{state="{state}"}}'] for state in ("free", "cached", "used")}
    assert sum(blocks.values()) == seen['nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max"}'] > 0

    running_requests = 'tritonmind_requests{state="running"}'
    eventually_metric(server, running_requests, 0)
    long = Exchange(server.address, text_input="a", stream=True, request_id="long", **ENDLESS)
    eventually_metric(server, running_requests, 1)
    ask(server, cancel=True, request_id="long")
    long.reply()
    eventually_metric(server, running_requests, 0)


def with_parameters(workspace: Path, destination: Path, **parameters: str) -> Path:
    """The same workspace with other parameters in config.pbtxt."""
    no_log = shutil.ignore_patterns("server.log")  # it is another server's, which may run now
    shutil.copytree(workspace, destination, symlinks=True, copy_function=os.link, ignore=no_log)
    config = destination / "model_repository" / "tritonmind" / "config.pbtxt"
    text = config.read_text()
    config.unlink()
    config.write_text(
        text
        + "".join(
            f'\nparameters {{ key: "{name}" value: {{ string_value: "{value}" }} }}\n'
            for name, value in parameters.items()
        )
    )
    return destination


@dataclass
class Dialogue:
    """A session, and every prompt and answer of it as a client can work them out."""

    server: EmbeddedServer
    tokenizer: Tokenizer
    history: list[int] = field(default_factory=list)
    turns: list[tuple[list[int], Reply]] = field(default_factory=list)

    def say(self, text: str, *, step: int | None = None) -> Reply:
        messages = [{"role": "user", "content": text}]
        if not self.turns:
            messages.insert(0, {"role": "system", "content": SYSTEM})
        fields: dict[str, Any] = {"sequence_start": True} if not self.turns else {}
        if step is not None:
            fields["step"] = step
        reply = ask(
            self.server,
            session_id=1,
            messages=json.dumps(messages),
            sampling_parameters=json.dumps({**GREEDY, "max_tokens": 16}),
            **fields,
        )
        assert not reply.error, reply.error
        prompt = self.history[:step] + self._encoded(messages)
        assert reply.num_input_tokens == len(prompt)
        self.turns.append((prompt, reply))
        self.history = prompt + reply.token_ids
        return reply

    def _encoded(self, messages: list[dict[str, str]]) -> list[int]:
        """What the template of this checkpoint puts between the answers, less an end that was generated."""
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        if self.turns:
            ended = self.turns[-1][1].finish_reason == "stop" and self.history[-1] == self.tokenizer.eos_token_id
            text = ("\n" if ended else "<|im_end|>\n") + text
        return self.tokenizer.encode(text + "<|im_start|>assistant\n", add_special_tokens=False)


def test_dialogue_with_rewind_eviction_and_a_new_engine(smollm2_workspace: Path, tmp_path: Path) -> None:
    """Five turns: each answer is that of the same prompt sent at once."""
    small = {"session_len": "512", "cache_max_entry_count": "12"}
    workspace = with_parameters(smollm2_workspace, tmp_path / "workspace", **small)
    with running(workspace, metrics_port=0) as server:
        dialogue = Dialogue(server, Tokenizer.from_dir(workspace / "triton_models" / "tokenizer"))
        dialogue.say("What is the capital of France?")
        assert "Paris" in dialogue.turns[0][1].text
        first_length = len(dialogue.history)
        assert first_length > 128
        assert dialogue.say("And of Italy?").num_cached_tokens == (first_length - 1) // 64 * 64
        assert dialogue.say("And of Spain?", step=first_length).num_cached_tokens == (first_length - 1) // 64 * 64
        for number in (1, 2):
            other = [1000 * number + 7 * n for n in range(450)]
            assert not ask(server, input_ids=other, sampling_parameters='{"max_tokens": 1}').error
        assert dialogue.say("And of Germany?").num_cached_tokens == 0, "the history was not evicted"
        kill_engine(server)
        eventually_metric(server, "tritonmind_engine_restarts_total", 1)
        assert dialogue.say("Which of them lies on the Seine?").num_cached_tokens == 0
        assert len(dialogue.turns) == 5
        for prompt, reply in dialogue.turns:
            alone = ask(server, input_ids=prompt, sampling_parameters=json.dumps({**GREEDY, "max_tokens": 16}))
            assert alone.token_ids == reply.token_ids
        print("\n" + "\n".join(reply.text for _, reply in dialogue.turns))
    assert_accounts(server.log_path)
