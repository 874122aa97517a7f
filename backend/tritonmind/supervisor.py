"""Holds the engine, notices when it dies, and starts another one or ends the server, by policy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from tritonmind.errors import TritonmindError, UnavailableError

if TYPE_CHECKING:
    from tritonmind.engine.client import EngineClient

EngineFailurePolicy = Literal["restart", "exit"]

ENGINE_STOP_TIMEOUT_S = 5.0
MAX_RESTART_DELAY_S = 30.0

log = logging.getLogger("tritonmind")


class EngineSupervisor:
    """The engine that answers now. Thread-safe, except that one thread calls `watch`.

    start: makes an engine; blocks until it is ready. What it raises at first leaves the constructor; later it is tried
    again. on_exit: called once after an engine failure instead of a restart, when the policy is "exit". stopping: set
    before `close`, ends attempts to restart.
    """

    def __init__(
        self,
        start: Callable[[], EngineClient],
        policy: EngineFailurePolicy,
        on_exit: Callable[[], None],
        stopping: threading.Event,
    ) -> None:
        self.num_restarts = 0
        self._start = start
        self._policy = policy
        self._on_exit = on_exit
        self._stopping = stopping
        self._client: EngineClient | None = start()
        self._recovery: threading.Thread | None = None

    @property
    def client(self) -> EngineClient | None:
        """The engine, None while there is none."""
        return self._client

    def require(self) -> EngineClient:
        """The engine. UnavailableError while there is none."""
        client = self._client
        if client is None:
            restart = " and is being restarted" if self._policy == "restart" else ""
            raise UnavailableError(f"the engine is down{restart}")
        return client

    def watch(self) -> None:
        """Begin to replace an engine that is dead."""
        client = self._client
        if client is not None and not client.is_alive():
            recovery = threading.Thread(target=self._recover, args=(client,), name="recovery", daemon=True)
            self._client = None
            try:
                recovery.start()
            except RuntimeError:  # no thread to be had: the next look finds the dead engine again
                self._client = client
                raise
            self._recovery = recovery

    def close(self) -> None:
        """Log the engine's state, in which nothing may be left in use, and stop it."""
        if self._recovery is not None:
            self._recovery.join(ENGINE_STOP_TIMEOUT_S)
        client, self._client = self._client, None
        if client is not None:
            _log_engine(client)
            client.shutdown(ENGINE_STOP_TIMEOUT_S)

    def _recover(self, failed: EngineClient) -> None:
        """Fail what the dead engine owed, then start another one, waiting longer after each attempt, or leave."""
        log.error("the engine failed; its requests are answered UNAVAILABLE; policy: %s", self._policy)
        try:
            failed.shutdown(ENGINE_STOP_TIMEOUT_S)
        except Exception:
            log.exception("what is left of the failed engine could not be removed")
        if self._policy == "exit":
            self._on_exit()
            return
        delay = 1.0
        while not self._stopping.is_set():
            begin = time.monotonic()
            try:
                client = self._start()
            except Exception as error:
                text = error if isinstance(error, TritonmindError) else repr(error)
                log.error("the engine did not start again, next attempt in %g s: %s", delay, text)
                self._stopping.wait(delay)
                delay = min(2 * delay, MAX_RESTART_DELAY_S)
                continue
            if self._stopping.is_set():
                client.shutdown(ENGINE_STOP_TIMEOUT_S)
            else:
                self.num_restarts += 1
                self._client = client
                log.info("the engine is back after %.1f s", time.monotonic() - begin)
            return


def _log_engine(client: EngineClient) -> None:
    try:
        client.check_integrity(ENGINE_STOP_TIMEOUT_S)
        stats = client.stats(ENGINE_STOP_TIMEOUT_S)
    except Exception as error:  # closing goes on; AssertionError is what a failed check raises
        log.error("the engine's state is unknown or wrong: %r", error)
        return
    log.info(
        "engine: %d running, %d waiting; blocks: %d free, %d cached, %d used of %d; "
        "kernels compiled while serving: %d; integrity checked",
        stats.num_running,
        stats.num_waiting,
        stats.num_free_blocks,
        stats.num_cached_blocks,
        stats.num_used_blocks,
        stats.num_blocks,
        stats.num_jit_compiles,
    )
