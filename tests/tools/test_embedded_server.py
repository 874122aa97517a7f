"""The embedded server with a small echo backend: it starts, answers, stops, and says why when it cannot."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tritonmind.errors import WorkspaceError
from tritonmind_tools.embedded_server import EmbeddedServer, ServerStartError
from tritonmind_tools.ports import PortTakenError, ensure_port_free, free_port, port_holder
from tritonmind_tools.server_log import failure_cause

ROOT = Path(__file__).resolve().parents[2]

SOURCE_ENV = {**os.environ, "PYTHONPATH": f"{ROOT / 'backend'}:{ROOT / 'tools'}"}

CONFIG = """
name: "tritonmind"
backend: "tritonmind"
max_batch_size: 0
input [{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }]
output [{ name: "text_output" data_type: TYPE_STRING dims: [ 1 ] }]
instance_group [{ kind: KIND_MODEL count: 1 }]
"""

# ECHO_FAIL makes it fail while loading; its child process must die with the server.
ECHO = """
import os
import subprocess
import tritonmind
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        if "ECHO_FAIL" in os.environ:
            raise pb_utils.TritonModelException(os.environ["ECHO_FAIL"])
        self.child = subprocess.Popen(["sleep", "600"])
        pb_utils.Logger.log_info(f"child process {self.child.pid}")
        pb_utils.Logger.log_info(f"package {os.path.realpath(tritonmind.__file__)}")

    def execute(self, requests):
        texts = [pb_utils.get_input_tensor_by_name(r, "text_input").as_numpy() for r in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text)]) for text in texts]

    def finalize(self):
        pb_utils.Logger.log_info("finalized")
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    model = tmp_path / "ws" / "model_repository" / "tritonmind"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(CONFIG)
    return tmp_path / "ws"


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    path = tmp_path / "echo" / "model.py"
    path.parent.mkdir()
    path.write_text(ECHO)
    return path


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def ask(address: str, text: str) -> str:
    from tritonclient import grpc

    with grpc.InferenceServerClient(address) as client:
        tensor = grpc.InferInput("text_input", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([text.encode()], dtype=object))
        answer = client.infer("tritonmind", [tensor]).as_numpy("text_output")
    assert answer is not None
    return str(answer[0].decode())


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie waiting for its parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def ends(pid: int, timeout: float = 5) -> bool:
    """Whether a process that was told to end does so soon: a signal takes a moment where the machine is busy."""
    deadline = time.monotonic() + timeout
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


def child_pid(log: Path) -> int:
    found = re.search(r"child process (\d+)", log.read_text())
    assert found
    return int(found[1])


@pytest.mark.server
def test_serves_and_stops_everything(workspace: Path, echo: Path, tmp_path: Path) -> None:
    progress: list[str] = []
    server = EmbeddedServer(
        workspace, grpc_port=0, model_py=echo, log_path=tmp_path / "server.log", on_progress=progress.append
    )
    with server:
        assert ask(server.address, "hello") == "hello"
        pid, child = server.pid, child_pid(server.log_path)
        assert is_running(pid)
        assert is_running(child)
        assert server._scratch is not None
        shutil.rmtree(server._scratch)  # as a cleaner of /tmp does
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert ends(pid) and ends(child)
    log = server.log_path.read_text()
    assert "finalized" in log
    assert f"package {ROOT / 'backend' / 'tritonmind' / '__init__.py'}" in log
    assert str(server.log_path) in progress[0]


@pytest.mark.server
def test_backend_failure_is_told_without_the_log(workspace: Path, echo: Path, tmp_path: Path) -> None:
    cause = 'config.ini line 3: session_len="x" is no number'
    server = EmbeddedServer(
        workspace, grpc_port=0, model_py=echo, log_path=tmp_path / "server.log", env={"ECHO_FAIL": cause}
    )
    with pytest.raises(ServerStartError) as caught:
        server.start()
    assert str(caught.value) == f"{cause}\nThe server's log is {tmp_path / 'server.log'}"


@pytest.mark.server
def test_server_dies_with_a_killed_parent(workspace: Path, echo: Path, tmp_path: Path) -> None:
    script = f"""
        import time
        from pathlib import Path
        from tritonmind_tools.embedded_server import EmbeddedServer
        workspace, echo, log = {[str(workspace), str(echo), str(tmp_path / "log")]!r}
        server = EmbeddedServer(workspace, grpc_port=0, model_py=Path(echo), log_path=log)
        server.start()
        print(server.pid, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], env=SOURCE_ENV, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        assert is_running(pid)
        parent.kill()
        parent.wait()
        assert ends(pid, timeout=10)
    finally:
        parent.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_serves_until_a_signal(workspace: Path, echo: Path, tmp_path: Path, number: signal.Signals) -> None:
    port, metrics, log = free_port(), free_port(), tmp_path / "log"
    arguments = ["serve", "triton_server", str(workspace), "--grpc_port", str(port), "--metrics", str(metrics)]
    command = [
        sys.executable,
        "-m",
        "tritonmind_tools.cli",
        *arguments,
        f"--lib-dir={echo.parent}",
        f"--log-file={log}",
    ]
    with subprocess.Popen(command, env=SOURCE_ENV, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shown = ""
        for line in process.stdout:
            shown += line
            if "Metrics:" in line:
                break
        assert f"tritonmind serve triton_client 127.0.0.1:{port}" in shown
        assert ask(f"127.0.0.1:{port}", "hello") == "hello"
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10) as answer:
            assert b"nv_inference_request_success" in answer.read()
        process.send_signal(number)
        assert process.wait(30) == 0
        assert "Stopped" in process.stdout.read()
    assert ends(child_pid(log))


def test_taken_port_names_port_holder_and_option(workspace: Path, echo: Path, listener: int) -> None:
    with pytest.raises(PortTakenError) as caught:
        EmbeddedServer(workspace, grpc_port=listener, model_py=echo).start()
    message = str(caught.value)
    assert str(listener) in message
    assert f"(process {os.getpid()})" in message
    assert "--grpc-port" in message


def test_free_port_has_no_holder() -> None:
    port = free_port()
    assert port_holder(port) is None
    ensure_port_free("127.0.0.1", port, "--grpc-port")


def test_not_a_workspace_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"model_repository/tritonmind/config\.pbtxt is missing"):
        EmbeddedServer(tmp_path)
    with pytest.raises(WorkspaceError, match=re.escape(str(tmp_path / "absent"))):
        EmbeddedServer(tmp_path / "absent")


@pytest.mark.parametrize(
    ("log", "return_code", "expected"),
    [
        ("", -9, "for lack of memory"),
        ("", -11, "SIGSEGV"),
        ("", 3, "exit code 3"),
        (
            "E1 x] \"failed to load 'm' version 1: Internal: ValueError: boom\\n\\nAt:\\n  f(1)\\n\"",
            1,
            "ValueError: boom",
        ),
        ("E1 x] \"failed to load 'm' version 1: Internal: TritonModelException: no weights\"", 1, "no weights"),
        (
            "Unable to initialize shared memory key 'triton_1' to size 64: Error: No space left on device",
            1,
            "shared memory is full",
        ),
        ("[Errno 28] No space left on device: '/dev/shm/psm_1'", 1, "shared memory is full"),
        ("Failed to increase the shared memory pool size. Error: No space left on device", 1, "shared memory is full"),
        ("write: No space left on device", 1, "the disk is full"),
        (
            "I1 /dev/shm is mounted\nOSError: [Errno 28] No space left on device: '/tmp/k'",
            1,
            "disk is full: /tmp/k could not be written",
        ),
        ("cp: /var/k.so: No space left on device", 1, "disk is full: /var/k.so could not be written"),
        ("stub: libpython3.11.so.1.0: cannot open shared object file", 1, "install libpython"),
        ("error: creating server: Internal - failed to load all models", 1, "failed to load all models"),
    ],
)
def test_failure_cause(log: str, return_code: int, expected: str) -> None:
    cause = failure_cause(log, return_code)
    assert expected in cause
    assert "At:" not in cause
