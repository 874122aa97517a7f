"""`tritonmind serve triton_server`: a real Triton server for a workspace, without a container.

Order of side effects: check workspace and ports, lay out a backend directory in a temporary folder, start the server in
a session of its own, wait until its model is ready. `stop` undoes it: SIGTERM, a bounded wait, SIGKILL to what is left
of the session, the folder removed. The log stays.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import tritonmind
from tritonmind.config import DRAIN_FILE_VARIABLE
from tritonmind.errors import TritonmindError, WorkspaceError
from tritonmind.resources import resource
from tritonmind_tools.ports import ensure_port_free, free_port
from tritonmind_tools.server_install import ServerInstall, find_server
from tritonmind_tools.server_log import failure_cause

MODEL_NAME = "tritonmind"
DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_GRPC_PORT = 33337
DEFAULT_HTTP_PORT = 33338
DEFAULT_METRICS_PORT = 33339
DEFAULT_START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 9.0  # Ctrl-C ends everything within 10 s

_POLL_INTERVAL_S = 0.1
_PROGRESS_INTERVAL_S = 5.0
_PR_SET_PDEATHSIG = 1


class ServerStartError(TritonmindError):
    """The server did not become ready. The message is the cause and where the log is."""


class EmbeddedServer:
    """A Triton server process serving one workspace. A context manager; ready when entered.

    workspace: a folder that `tritonmind convert` wrote. grpc_port, http_port, metrics_port: 0 picks a free one, None
    (not for gRPC) leaves the service off. model_py: the backend's code, the package's own by default. env: variables
    added to the server's environment. on_progress: told in words what happens while starting.

    Start and stop it on the same thread: the server gets SIGTERM when the thread that started it ends, so that it
    never outlives a killed parent.
    """

    def __init__(
        self,
        workspace: str | os.PathLike[str],
        *,
        grpc_port: int = DEFAULT_GRPC_PORT,
        http_port: int | None = None,
        metrics_port: int | None = None,
        address: str = DEFAULT_ADDRESS,
        log_path: str | os.PathLike[str] | None = None,
        log_verbose: int = 0,
        start_timeout_s: float = DEFAULT_START_TIMEOUT_S,
        model_py: Path | None = None,
        env: Mapping[str, str] | None = None,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.repository = _model_repository(Path(workspace))
        self.host = address
        self.grpc_port = grpc_port or free_port(address)
        self.http_port = free_port(address) if http_port == 0 else http_port
        self.metrics_port = free_port(address) if metrics_port == 0 else metrics_port
        self.log_path = Path(log_path) if log_path is not None else _default_log_path(self.grpc_port)
        self._log_verbose = log_verbose
        self._start_timeout_s = start_timeout_s
        self._model_py = model_py or resource("backend/model.py")
        if not self._model_py.is_file():
            raise TritonmindError(
                f"{self._model_py} is missing: --lib-dir takes a folder that holds a backend's model.py"
            )
        self._env = dict(env or {})
        self._on_progress = on_progress
        self._scratch: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """host:port of the gRPC service, as clients take it."""
        return f"[{self.host}]:{self.grpc_port}" if ":" in self.host else f"{self.host}:{self.grpc_port}"

    @property
    def _drain_file(self) -> Path:
        """Tells the adapter to end its requests, which the server, told to exit, would wait for."""
        assert self._scratch is not None
        return self._scratch / "drain"

    @property
    def pid(self) -> int:
        """Process id of tritonserver, which is also its session and process group."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until its model is ready.

        Raises PortTakenError, ServerInstallError, or ServerStartError with the cause; nothing is left running then.
        """
        assert self._process is None, "the server was started already"
        for port, option in (
            (self.grpc_port, "--grpc-port"),
            (self.http_port, "--http"),
            (self.metrics_port, "--metrics"),
        ):
            if port is not None:
                ensure_port_free(self.host, port, option)
        install = find_server()
        try:
            self._scratch = Path(tempfile.mkdtemp(prefix="tritonmind-server-"))
            backends = install.lay_out_backends(self._scratch / "backends", MODEL_NAME, self._model_py)
            self._launch(install, backends)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Stop the server and everything it started. Idempotent. After `timeout` seconds what still runs is killed."""
        process, self._process = self._process, None
        try:
            if process is not None and process.poll() is None:
                self._drain_file.parent.mkdir(exist_ok=True)  # cleaners of /tmp may have taken it meanwhile
                self._drain_file.touch()
                process.terminate()
                process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._on_progress(f"The server did not stop within {timeout:g} s and is killed")
        finally:
            if process is not None:
                _kill_group(process.pid)
                process.wait()
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch = None

    def wait(self) -> int:
        """Block until the server ends by itself; returns its exit code."""
        assert self._process is not None, "the server was not started"
        return self._process.wait()

    def failure(self, return_code: int | None) -> ServerStartError:
        """The error for a server that ended or never became ready, with the cause its log gives."""
        log = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return ServerStartError(f"{failure_cause(log, return_code)}\nThe server's log is {self.log_path}")

    def _launch(self, install: ServerInstall, backends: Path) -> None:
        assert self._scratch is not None
        # The stub imports from its working directory first. Our own package lies there and nothing else, so that it
        # runs the code of this process even where another version, or none, is installed.
        directory = self._scratch / "cwd"
        directory.mkdir()
        (directory / "tritonmind").symlink_to(Path(tritonmind.__file__).resolve().parent)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork
        parent = os.getpid()

        def end_with_parent() -> None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [str(install.executable), *self._flags(backends)],
                env={**install.environment(), DRAIN_FILE_VARIABLE: str(self._drain_file), **self._env},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def _flags(self, backends: Path) -> list[str]:
        flags = [
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            "--allow-grpc=true",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.grpc_port}",
            f"--exit-timeout-secs={int(STOP_TIMEOUT_S) - 1}",
            f"--log-verbose={self._log_verbose}",
        ]
        for service, port in (("http", self.http_port), ("metrics", self.metrics_port)):
            flags.append(f"--allow-{service}={str(port is not None).lower()}")
            if port is not None:
                flags += [f"--{service}-address={self.host}", f"--{service}-port={port}"]
        return flags

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        started = last_report = time.monotonic()
        self._on_progress(f"Starting the Triton server (log: {self.log_path})")
        while not self._is_ready():
            return_code = self._process.poll()
            if return_code is not None:
                raise self.failure(return_code)
            now = time.monotonic()
            if now - started > self._start_timeout_s:
                raise ServerStartError(
                    f"the server was not ready after {self._start_timeout_s:g} s; its log is {self.log_path}"
                )
            if now - last_report >= _PROGRESS_INTERVAL_S:
                last_report = now
                self._on_progress(f"Loading the model ({now - started:.0f} s)")
            time.sleep(_POLL_INTERVAL_S)

    def _is_ready(self) -> bool:
        """Whether the model answers. A plain connection is tried first: gRPC backs off for seconds after a refusal."""
        try:
            socket.create_connection((self.host, self.grpc_port), timeout=1).close()
        except OSError:
            return False
        from tritonclient import grpc
        from tritonclient.utils import InferenceServerException

        with grpc.InferenceServerClient(self.address) as client:
            try:
                return bool(
                    client.is_server_ready(client_timeout=5) and client.is_model_ready(MODEL_NAME, client_timeout=5)
                )
            except InferenceServerException:
                return False


def register(subparsers: Any) -> None:
    """Add `triton_server` to the subparsers of `tritonmind serve`."""
    parser = subparsers.add_parser(
        "triton_server",
        help="serve a workspace with the embedded Triton server",
        description="Serve a workspace with the Triton server of the nvidia-pytriton wheel. Ctrl-C stops it.",
    )
    parser.add_argument("workspace", help="folder that `tritonmind convert` wrote")
    parser.add_argument(
        "--grpc-port", type=_port, default=DEFAULT_GRPC_PORT, metavar="PORT", help="default %(default)s"
    )
    parser.add_argument("--grpc-address", default=DEFAULT_ADDRESS, metavar="ADDR", help="default %(default)s")
    for service, port in (("http", DEFAULT_HTTP_PORT), ("metrics", DEFAULT_METRICS_PORT)):
        parser.add_argument(
            f"--{service}",
            type=_port,
            nargs="?",
            const=port,
            metavar="PORT",
            help=f"also {service}, default port {port}",
        )
    parser.add_argument(
        "--lib-dir",
        type=Path,
        metavar="DIR",
        help="folder of a backend's model.py to serve with, not the package's own",
    )
    parser.add_argument(
        "--log-file", type=Path, metavar="FILE", help="the server's log, default in the cache directory"
    )
    parser.add_argument("--log-verbose", type=int, default=0, metavar="N", help="0 is information, 1 and more verbose")
    parser.add_argument(
        "--start-timeout", type=float, default=DEFAULT_START_TIMEOUT_S, metavar="S", help="seconds, default %(default)g"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP. Raises TritonmindError with the cause when the server fails."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    server = EmbeddedServer(
        args.workspace,
        grpc_port=args.grpc_port,
        http_port=args.http,
        metrics_port=args.metrics,
        address=args.grpc_address,
        log_path=args.log_file,
        log_verbose=args.log_verbose,
        start_timeout_s=args.start_timeout,
        model_py=args.lib_dir / "model.py" if args.lib_dir else None,
        on_progress=_say,
    )
    started = time.monotonic()
    try:
        with server:
            _say(f"Ready after {time.monotonic() - started:.1f} s. Try it from another terminal:")
            _say(f"  tritonmind serve triton_client {server.address}")
            for service, port in (("HTTP", server.http_port), ("Metrics", server.metrics_port)):
                if port is not None:
                    path = "/metrics" if service == "Metrics" else ""
                    _say(f"  {service}: http://{args.grpc_address}:{port}{path}")
            raise server.failure(server.wait())
    except KeyboardInterrupt:
        _say("Stopped")
        return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 1 to 65535, or 0 for any free one")
    return int(text)


def _model_repository(workspace: Path) -> Path:
    repository = workspace / "model_repository"
    if not workspace.is_dir():
        raise WorkspaceError(f"{workspace} is not a directory; make a workspace with `tritonmind convert`")
    if not (repository / MODEL_NAME / "config.pbtxt").is_file():
        raise WorkspaceError(
            f"{workspace} is no workspace: model_repository/{MODEL_NAME}/config.pbtxt is missing; "
            "give the folder that `tritonmind convert` wrote"
        )
    return repository.resolve()


def _default_log_path(port: int) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tritonmind" / f"server-{port}.log"


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it has ended, as it should
