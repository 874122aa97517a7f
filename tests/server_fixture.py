"""A real Triton server with a tiny random model, and what its log says at the end."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.workspaces import tiny_workspace
from tritonmind_tools.embedded_server import EmbeddedServer
from tritonmind_tools.server_install import HOME_VARIABLE

ENGINE_MODULE = "tritonmind.engine.core_process"


def make_workspace(directory: Path, *options: str, **checkpoint: Any) -> Path:
    """A workspace whose engine uses one thread, so that the tests leave the machine usable."""
    directory.mkdir(parents=True, exist_ok=True)
    workspace = tiny_workspace(directory, *options, **{"max_position_embeddings": 4096, **checkpoint})
    config = workspace / "model_repository" / "tritonmind" / "config.pbtxt"
    text = config.read_text()
    unset = '"num_threads" value: { string_value: "" }'
    assert unset in text
    config.write_text(text.replace(unset, unset.replace('""', '"1"')))
    return workspace


def need_server() -> None:
    """Skip the test where there is no Triton server, neither its wheel nor $TRITONSERVER_HOME."""
    if importlib.util.find_spec("pytriton") is None and HOME_VARIABLE not in os.environ:
        pytest.skip(f"nvidia-pytriton is not installed, and {HOME_VARIABLE} is not set")


@contextmanager
def running(workspace: Path, http_port: int | None = None, metrics_port: int | None = None) -> Iterator[EmbeddedServer]:
    """A ready server; skips the test where there is none."""
    need_server()
    log_path = workspace / "server.log"
    with EmbeddedServer(
        workspace, grpc_port=0, log_path=log_path, http_port=http_port, metrics_port=metrics_port
    ) as server:
        yield server


def session_processes(session: int) -> dict[int, str]:
    """Command lines by process id of what runs in a session; the server leads one."""
    listed = subprocess.run(["ps", "-ww", "-s", str(session), "-o", "pid=,stat=,args="], capture_output=True, text=True)
    rows = (line.split(None, 2) for line in listed.stdout.splitlines())
    return {int(pid): args for pid, state, args in rows if not state.startswith("Z")}


def kill_engine(server: EmbeddedServer) -> None:
    (pid,) = (pid for pid, args in session_processes(server.pid).items() if ENGINE_MODULE in args)
    os.kill(pid, signal.SIGKILL)


def assert_accounts(log_path: Path, num_requests: int | None = None) -> None:
    """After an orderly stop: every request got its FINAL, no block is in use, and no process crashed."""
    log = log_path.read_text()
    accounts = re.search(r"requests accepted: (\d+), final responses sent: (\d+)", log)
    assert accounts, log[-3000:]
    accepted, finals = map(int, accounts.groups())
    assert accepted == finals
    assert num_requests is None or accepted == num_requests
    blocks = re.search(
        r"engine: (\d+) running, (\d+) waiting; blocks: (\d+) free, (\d+) cached, (\d+) used of (\d+)", log
    )
    assert blocks, log[-3000:]
    num_running, num_waiting, free, cached, used, total = map(int, blocks.groups())
    assert (num_running, num_waiting, used) == (0, 0, 0)
    assert free + cached == total
    assert "kernels compiled while serving: 0;" in log
    for crash in ("Signal (6)", "Signal (11)", "Segmentation fault", "Fatal Python error"):
        assert crash not in log
