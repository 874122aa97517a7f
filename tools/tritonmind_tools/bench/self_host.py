"""A workspace served by the embedded server or the API server, and run by a bare engine with the same settings."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tritonmind.errors import UnavailableError, WorkspaceError
from tritonmind_tools.embedded_server import MODEL_NAME, EmbeddedServer
from tritonmind_tools.ports import free_port

if TYPE_CHECKING:
    from tritonmind.engine.client import EngineClient

TRITON, API_SERVER = FRONT_ENDS = ("triton", "api_server")
API_START_TIMEOUT_S = 600.0
API_STOP_TIMEOUT_S = 30.0
# config.pbtxt's parameters that are not the engine's.
_ADAPTER_PARAMETERS = ("engine_failure", "drain_timeout_s", "max_sessions", "max_session_tokens", "default_priority")


def model_folder(workspace: Path) -> Path:
    """The workspace's model as a Triton server takes it. Raises WorkspaceError for what is no workspace."""
    folder = workspace / "model_repository" / MODEL_NAME
    if not (folder / "config.pbtxt").is_file():
        raise WorkspaceError(f"--self-host={str(workspace)!r} is no workspace; make one with `tritonmind convert`")
    return folder


@contextmanager
def served_workspace(path: str, shape: str) -> Iterator[Path]:
    """The workspace at `path`, or for "" that of a RandomModel, which lives as long as it is used."""
    if path:
        yield Path(path)
        return
    # Here, because it loads torch.
    from tritonmind_tools.bench import random_checkpoint

    with tempfile.TemporaryDirectory(prefix="tritonmind-bench-") as scratch:
        workspace = Path(scratch) / "workspace"
        started = time.monotonic()
        random_checkpoint.write_workspace(shape, workspace, durable=False)
        print(f"random weights of {shape} written in {time.monotonic() - started:.1f} s", flush=True)
        yield workspace


@contextmanager
def hosted(workspace: Path, settings: Mapping[str, object]) -> Iterator[EmbeddedServer]:
    """A ready server on a free port of 127.0.0.1. settings: parameters over those of the workspace's config.pbtxt.

    Raises what EmbeddedServer raises.
    """
    model = model_folder(workspace)
    with tempfile.TemporaryDirectory(prefix="tritonmind-bench-") as scratch:
        copy = Path(scratch) / "model_repository" / MODEL_NAME
        copy.mkdir(parents=True)
        for entry in model.iterdir():
            if entry.name != "config.pbtxt":
                (copy / entry.name).symlink_to(entry.resolve())
        # Of a key that comes twice the last value counts.
        lines = [_parameter(name, value) for name, value in settings.items()]
        (copy / "config.pbtxt").write_text("\n".join([(model / "config.pbtxt").read_text(), *lines, ""]))
        with EmbeddedServer(scratch, grpc_port=0, on_progress=lambda text: print(text, flush=True)) as server:
            yield server


@contextmanager
def hosted_api(workspace: Path, settings: Mapping[str, object]) -> Iterator[str]:
    """The address of a ready API server in a process of its own. settings: the engine's, over the workspace's.

    Raises UnavailableError when it does not get ready; what it prints says why.
    """
    port = free_port()
    code = "import sys; from tritonmind_tools.cli import main; sys.exit(main())"
    options = [f"{name}={value}" for name, value in settings.items()]
    serve = ["serve", "api_server", str(workspace), "--server-port", str(port), "--model-name", MODEL_NAME]
    process = subprocess.Popen([sys.executable, "-c", code, *serve, "--engine-options", *options])
    try:
        deadline = time.monotonic() + API_START_TIMEOUT_S
        while not _is_healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"the API server did not get ready (exit status {process.poll()})")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(API_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def engine_settings(address: str) -> dict[str, object]:
    """The engine's settings, as the server at `address` gave them to its own."""
    from tritonclient import grpc

    with grpc.InferenceServerClient(address) as client:
        config = client.get_model_config(MODEL_NAME).config
    return {
        name: _value(entry.string_value)
        for name, entry in config.parameters.items()
        if entry.string_value and name not in _ADAPTER_PARAMETERS and not name.isupper()
    }


@contextmanager
def bare_engine(workspace: Path, settings: dict[str, object]) -> Iterator[EngineClient]:
    """An engine in a process of its own, as the adapter starts it."""
    from tritonmind.engine.launch import start_engine

    client = start_engine(str(workspace), settings)
    try:
        yield client
    finally:
        client.shutdown()


def _parameter(name: str, value: object) -> str:
    text = json.dumps(value) if isinstance(value, (bool, int, float)) else str(value)
    return f"parameters {{ key: {json.dumps(name)} value: {{ string_value: {json.dumps(text)} }} }}"


def _value(text: str) -> object:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (int, float, bool)) else text
