"""The engine in a thread of this process: for the local Python API and tests."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence

from tritonmind.engine.client import EngineClient
from tritonmind.engine.core import EngineCore
from tritonmind.engine.loop import run_engine
from tritonmind.errors import TritonmindError
from tritonmind.messages import ToEngine
from tritonmind.model_source import open_model, opening_options


class ThreadEngineClient(EngineClient):
    """Owns the engine's thread. Outputs are routed on that thread, so callbacks share it with the steps."""

    def __init__(self, model_path: str, overrides: Mapping[str, object]) -> None:
        super().__init__()
        self._inbox: queue.SimpleQueue[Sequence[ToEngine]] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(model_path, dict(overrides)), daemon=True, name="engine"
        )
        self._thread.start()

    def _run(self, model_path: str, overrides: dict[str, object]) -> None:
        try:
            source = open_model(model_path, **opening_options(overrides))
            core = EngineCore(source, source.engine_config(**overrides))
            run_engine(core, self._take, self._receive)
        except TritonmindError as error:
            self._fail(error)
        except BaseException as error:
            self._fail(TritonmindError(f"{type(error).__name__}: {error}"))
            raise

    def _take(self, timeout_s: float) -> list[ToEngine]:
        messages: list[ToEngine] = []
        try:
            messages += self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get_nowait()
            while True:
                messages += self._inbox.get_nowait()
        except queue.Empty:
            return messages

    def _send(self, *messages: ToEngine) -> None:
        self._inbox.put(messages)

    def _stop(self, timeout: float) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
