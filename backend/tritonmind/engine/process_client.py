"""The engine in its own process, over two ZeroMQ sockets in a private directory. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec
import zmq

from tritonmind.engine.client import EngineClient
from tritonmind.errors import TritonmindError, UnavailableError
from tritonmind.messages import FromEngine, ToEngine

MAX_SOCKET_DIRECTORY_LENGTH = 70  # a socket's whole path may have 107 characters
POLL_MS = 100  # how soon the end of the engine's process is noticed


class ProcessEngineClient(EngineClient):
    """Owns the engine's process, the sockets, and the thread that receives from it."""

    def __init__(self, model_path: str, overrides: Mapping[str, object], *, python: str | None = None) -> None:
        super().__init__()
        interpreter = python or find_interpreter()
        parent = None if len(tempfile.gettempdir()) < MAX_SOCKET_DIRECTORY_LENGTH else "/tmp"
        self._directory = tempfile.mkdtemp(prefix="tritonmind-", dir=parent)  # mode 0700: only we may connect
        addresses = {name: f"ipc://{self._directory}/{name}" for name in ("to_engine", "from_engine")}
        self._context = zmq.Context()
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.bind(addresses["to_engine"])
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(addresses["from_engine"])
        self._encoder = msgspec.msgpack.Encoder()
        self._closing = threading.Event()
        setup: dict[str, object] = {
            "model": os.fspath(model_path),
            "overrides": dict(overrides),
            **addresses,
        }
        try:
            self._process = _start_process(interpreter, setup)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._receive_all, name="engine-receive", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    def _send(self, *messages: ToEngine) -> None:
        # Without a peer a PUSH socket would block. The process is gone then: the receiving thread is about to notice,
        # and ends what is live, this too, with the cause.
        with contextlib.suppress(zmq.Again):
            self._outbox.send_multipart([self._encoder.encode(message) for message in messages], zmq.NOBLOCK)

    def _receive_all(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        while not self._closing.is_set():
            exited = self._process.poll() is not None
            # Its last words may come a little later than the news of its end.
            while self._inbox.poll(POLL_MS):
                self._receive(decoder.decode(self._inbox.recv()))
            if exited:
                # An EngineFailed would have been received above and came first.
                self._fail(UnavailableError(f"the engine's process ended: {_describe_exit(self._process.returncode)}"))
                return
            if self._is_silent():
                self._fail(UnavailableError("the engine has given no sign of life for too long and is stopped"))
                self._process.kill()

    def _stop(self, timeout: float) -> None:
        assert self._process.stdin is not None
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._release()

    def _release(self) -> None:
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)


def find_interpreter() -> str:
    """A Python of our own version to run the engine with.

    Inside Triton server's stub `sys.executable` is whatever python3 is first on PATH, or empty, so it is checked.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    tried = []
    candidates = (
        sys.executable,
        os.path.join(sys.prefix, "bin", f"python{version}"),
        *map(shutil.which, (f"python{version}", "python3")),
    )
    for candidate in dict.fromkeys(filter(None, candidates)):
        found = _version_of(candidate)
        if found == version:
            return candidate
        tried.append(f"{candidate} ({found or 'does not run'})")
    raise TritonmindError(f"no Python {version} found to run the engine with; tried {', '.join(tried) or 'nothing'}")


def _version_of(python: str) -> str | None:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        result = subprocess.run([python, "-S", "-c", code], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _start_process(python: str, setup: dict[str, object]) -> subprocess.Popen[bytes]:
    # The engine must be the same code as this client, wherever that was imported from.
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Inherited: a terminal's Ctrl-C, which is for us, must not end it while it imports, in a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(
            [python, "-m", "tritonmind.engine.core_process"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert process.stdin is not None
    process.stdin.write(json.dumps(setup).encode() + b"\n")
    process.stdin.flush()
    return process


def _describe_exit(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        hint = " (out of memory?)" if returncode == -9 else ""
        return f"killed by signal {-returncode}{hint}"
    return f"exit status {returncode}"
