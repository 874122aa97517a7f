"""The engine behind its client, in a thread and in a process: answers, aborts, failures, shutdown."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from tritonmind.engine import process_client
from tritonmind.engine.client import EngineClient
from tritonmind.engine.launch import start_engine
from tritonmind.engine.process_client import ProcessEngineClient
from tritonmind.errors import ConfigError, InvalidRequestError, TritonmindError, UnavailableError, WorkspaceError
from tritonmind.messages import EngineRequest, TokenOutput

OVERRIDES: dict[str, object] = {"device": "cpu", "cache_max_entry_count": 64, "num_threads": 1}


def request(client: EngineClient, prompt: list[int], max_tokens: int) -> EngineRequest:
    return EngineRequest(
        request_id=client.next_request_id(),
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        stop_token_ids=[],
    )


def answer(client: EngineClient, prompt: list[int], max_tokens: int) -> tuple[list[int], TokenOutput]:
    outputs = list(client.stream(request(client, prompt, max_tokens)))
    assert all(output.finish_reason is None for output in outputs[:-1])
    return [token_id for output in outputs for token_id in output.token_ids], outputs[-1]


def next_output(outputs: queue.SimpleQueue[TokenOutput]) -> TokenOutput:
    return outputs.get(timeout=60)


@pytest.fixture(scope="module", params=["thread", "process"])
def client(workspace: Path, request: pytest.FixtureRequest) -> Iterator[EngineClient]:
    client = start_engine(str(workspace), OVERRIDES, in_process=request.param == "thread")
    yield client
    client.check_integrity()
    client.shutdown()


@pytest.fixture
def own_process(workspace: Path) -> Iterator[ProcessEngineClient]:
    client = start_engine(str(workspace), OVERRIDES)
    assert isinstance(client, ProcessEngineClient)
    yield client
    client.shutdown()


def test_info_is_that_of_the_workspace(client: EngineClient) -> None:
    assert client.is_alive()
    assert client.info.num_blocks == 64 and client.info.max_model_len == 512 and client.info.dtype == "float32"
    assert "64 blocks of 64 tokens" in client.info.memory_plan


def test_exactly_max_tokens_come_and_the_last_says_length(client: EngineClient) -> None:
    token_ids, last = answer(client, [5, 6, 7], 9)
    assert len(token_ids) == 9
    assert last.finish_reason == "length" and last.num_prompt_tokens == 3


def test_time_in_the_queue_comes_once_with_the_first_token(client: EngineClient) -> None:
    outputs = list(client.stream(request(client, [5, 6, 7], 4)))
    assert outputs[0].queue_time_s is not None and 0 <= outputs[0].queue_time_s < 5
    assert all(output.queue_time_s is None for output in outputs[1:])


def test_heartbeats_bring_statistics_a_few_times_a_second(client: EngineClient) -> None:
    answer(client, [8, 9], 3)
    expected = client.stats()
    assert expected.step_cpu_s > 0
    deadline = time.monotonic() + 1
    while client.latest_stats != expected:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_concurrent_answers_are_those_of_each_request_alone(client: EngineClient) -> None:
    prompts = [[10 + n] * (1 + 9 * n) for n in range(8)]
    alone = [answer(client, prompt, 12)[0] for prompt in prompts]
    together: dict[int, list[int]] = {}

    def run(index: int) -> None:
        together[index] = answer(client, prompts[index], 12)[0]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[index] for index in range(len(prompts))] == alone


def test_a_second_request_reports_the_tokens_it_found_cached(client: EngineClient) -> None:
    client.reset_prefix_cache()
    prompt = [7] * 150
    assert answer(client, prompt, 2)[1].num_cached_tokens == 0
    assert answer(client, prompt, 2)[1].num_cached_tokens == 128


def test_abort_gives_one_last_output_and_the_blocks_back(client: EngineClient) -> None:
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    long = request(client, [3, 4], 400)
    client.submit(long, outputs.put)
    next_output(outputs)
    client.abort([long.request_id, 10**9])
    client.abort([long.request_id])
    last = next_output(outputs)
    while last.finish_reason is None:
        last = next_output(outputs)
    assert last.finish_reason == "cancelled"
    stats = client.stats()
    assert stats.num_running == stats.num_waiting == stats.num_used_blocks == 0
    client.check_integrity()
    with pytest.raises(queue.Empty):
        outputs.get(timeout=0.2)


def test_leaving_a_stream_early_aborts_it(client: EngineClient) -> None:
    finished_before = client.stats().num_finished
    for _ in client.stream(request(client, [3, 4], 400)):
        break
    deadline = time.monotonic() + 30
    while client.stats().num_finished == finished_before:
        assert time.monotonic() < deadline
    assert client.stats().num_used_blocks == 0


def test_a_killed_engine_ends_every_request_once_with_the_cause(own_process: ProcessEngineClient) -> None:
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    for _ in range(3):
        own_process.submit(request(own_process, [3], 500), outputs.put)
    next_output(outputs)
    os.kill(own_process.pid, signal.SIGKILL)
    lasts = []
    while len(lasts) < 3:
        output = next_output(outputs)
        if output.finish_reason is not None:
            lasts.append(output)
    assert {output.request_id for output in lasts} == {0, 1, 2}
    assert all(output.finish_reason == "error" and "signal 9" in str(output.error) for output in lasts)
    assert not own_process.is_alive()
    with pytest.raises(UnavailableError, match="signal 9"):
        own_process.submit(request(own_process, [3], 5), outputs.put)
    with pytest.raises(UnavailableError, match="signal 9"):
        own_process.stats()


def test_what_is_sent_while_the_engine_dies_neither_blocks_nor_is_lost(own_process: ProcessEngineClient) -> None:
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    accepted = set()

    def submit() -> int:
        new = request(own_process, [3], 500)
        own_process.submit(new, outputs.put)
        accepted.add(new.request_id)
        return new.request_id

    first = submit()
    next_output(outputs)
    os.kill(own_process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while own_process.is_alive():
        assert time.monotonic() < deadline, "the engine's end was not noticed"
        own_process.abort([first])
        with contextlib.suppress(UnavailableError):  # noticed since the loop looked
            submit()
        time.sleep(0.002)
    ended = set()
    while ended != accepted:
        output = next_output(outputs)
        if output.finish_reason is not None:
            assert output.request_id not in ended and "signal 9" in str(output.error)
            ended.add(output.request_id)


def test_shutdown_ends_live_requests_and_is_idempotent(workspace: Path) -> None:
    client = start_engine(str(workspace), OVERRIDES)
    assert isinstance(client, ProcessEngineClient)
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    client.submit(request(client, [3], 500), outputs.put)
    next_output(outputs)
    started = time.monotonic()
    client.shutdown()
    assert time.monotonic() - started < 10
    last = next_output(outputs)
    while last.finish_reason is None:
        last = next_output(outputs)
    assert last.finish_reason == "error" and "shut down" in str(last.error)
    client.shutdown()
    assert not Path(client._directory).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(client.pid, 0)


def test_the_engine_dies_with_its_parent(workspace: Path) -> None:
    program = (
        "import sys, time\n"
        "from tritonmind.engine.launch import start_engine\n"
        "client = start_engine(sys.argv[1], {'cache_max_entry_count': 64})\n"
        "print(client.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(workspace)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.05)


def test_ctrl_c_while_it_starts_ends_it_without_a_word(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    client = ProcessEngineClient(str(workspace), OVERRIDES)
    os.kill(client.pid, signal.SIGINT)  # a terminal sends it to both
    interrupt = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        client.wait_ready()
    assert not client.is_alive() and client._process.returncode == -signal.SIGKILL
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("in_process", [True, False])
def test_what_keeps_an_engine_from_starting_is_named(workspace: Path, tmp_path: Path, in_process: bool) -> None:
    with pytest.raises(TritonmindError, match=str(tmp_path)):
        start_engine(str(tmp_path), {}, in_process=in_process)
    with pytest.raises(ConfigError, match="num_thread"):
        start_engine(str(workspace), {"num_thread": 1}, in_process=in_process)
    with pytest.raises(ConfigError, match="session_len=512 tokens needs 8"):
        start_engine(str(workspace), {"device": "cpu", "cache_max_entry_count": 3}, in_process=in_process)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test must lack")
def test_a_missing_gpu_is_named(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"device=.cuda.: "):
        start_engine(str(workspace), {"device": "cuda"}, in_process=True)


def test_a_missing_workspace_is_a_workspace_error(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="nowhere"):
        start_engine(str(tmp_path / "nowhere"), {}, in_process=True)


def test_a_full_queue_refuses_and_recovers(workspace: Path) -> None:
    overrides = {**OVERRIDES, "max_num_seqs": 1, "max_queue_size": 1}
    client = start_engine(str(workspace), overrides, in_process=True)
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    ids = []
    for _ in range(2):
        long = request(client, [3], 500)
        client.submit(long, outputs.put)
        ids.append(long.request_id)
    with pytest.raises(UnavailableError, match="max_queue_size=1"):
        client.submit(request(client, [3], 5), outputs.put)
    client.abort(ids)
    for _ in ids:
        while next_output(outputs).finish_reason is None:
            pass
    assert len(answer(client, [3], 5)[0]) == 5
    client.shutdown()


def test_find_interpreter_takes_only_our_version(monkeypatch: pytest.MonkeyPatch) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(process_client, "_version_of", lambda python: version if python.endswith("python3") else "2.7")
    monkeypatch.setattr(process_client.sys, "executable", "")
    monkeypatch.setattr(process_client.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert process_client.find_interpreter() == "/usr/bin/python3"
    monkeypatch.setattr(process_client, "_version_of", lambda python: None)
    with pytest.raises(TritonmindError, match=rf"no Python {version}.*/usr/bin/python3 \(does not run\)"):
        process_client.find_interpreter()


def test_n_requests_are_taken_all_or_none(workspace: Path) -> None:
    client = start_engine(str(workspace), {**OVERRIDES, "max_num_seqs": 2, "max_queue_size": 1}, in_process=True)
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    try:
        with pytest.raises(InvalidRequestError, match="n=4 is invalid: 2 may run and max_queue_size=1 wait"):
            client.submit_all([request(client, [5], 3) for _ in range(4)], outputs.put)
        client.submit_all([request(client, [5], 400) for _ in range(2)], outputs.put)
        with pytest.raises(UnavailableError, match="queue is full: 2 requests are live"):
            client.submit_all([request(client, [6], 3) for _ in range(2)], outputs.put)
        assert answer(client, [6], 3)[1].finish_reason == "length", "there is room for one"
    finally:
        client.shutdown()


def test_requests_submitted_together_meet_in_one_step(
    own_process: ProcessEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes to encode them."""

    class SlowEncoder:
        def encode(self, message: object) -> bytes:
            time.sleep(0.02)
            return msgspec.msgpack.encode(message)

    monkeypatch.setattr(own_process, "_encoder", SlowEncoder())
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    own_process.submit_all([request(own_process, [5 + number] * 40, 1) for number in range(8)], outputs.put)
    assert len({next_output(outputs).request_id for _ in range(8)}) == 8
    assert own_process.stats().num_steps == 1
