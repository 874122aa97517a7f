"""A model that answers what a test says, and an application over it that runs in this process or behind a port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from tritonmind.chat_template import ChatTemplate
from tritonmind.errors import TritonmindError
from tritonmind.request_fields import ParsedRequest
from tritonmind_tools.api_server.app import Settings, create_app
from tritonmind_tools.api_server.backends import Backend, ServedModel
from tritonmind_tools.api_server.server import listen
from tritonmind_tools.console_transport import Delta

MODEL = "scripted"
START_TIMEOUT_S = 60.0


class ScriptedBackend:
    """Answers each request with what `script` yields of it: batches of deltas, errors, or seconds to wait."""

    def __init__(
        self, script: Callable[[ParsedRequest], list[Any]], *, template: str | None = None, ready: bool = True
    ) -> None:
        self.requests: list[ParsedRequest] = []
        self.num_closed_early = 0
        self.closed_early = threading.Event()
        self.model = ServedModel(
            name=MODEL,
            created=1_700_000_000,
            max_model_len=100,
            chat_template=None if template is None else ChatTemplate(template, {}, where="test"),
        )
        self._script = script
        self._ready = ready

    async def connect(self) -> None:
        pass

    async def answer(self, request: ParsedRequest) -> AsyncGenerator[list[Delta], None]:
        self.requests.append(request)
        done = False
        try:
            for item in self._script(request):
                if isinstance(item, TritonmindError):
                    raise item
                if isinstance(item, list):
                    yield item
                else:
                    await asyncio.sleep(item)
            done = True
        except TritonmindError:
            done = True
            raise
        finally:
            if not done:
                self.num_closed_early += 1
                self.closed_early.set()

    async def is_ready(self) -> bool:
        return self._ready

    def metrics(self) -> str:
        return "scripted 1\n"

    def close(self) -> None:
        pass


def words(*texts: str, finish_reason: str = "stop", prompt: int = 7, cached: int = 2, index: int = 0) -> list[Any]:
    """A batch a text, a token each; the last one ends the answer."""
    last = len(texts) - 1
    return [
        [
            Delta(
                index=index,
                text=text,
                token_ids=[number],
                num_tokens=1,
                num_input_tokens=prompt,
                num_cached_tokens=cached,
                finish_reason=finish_reason if number == last else None,
            )
        ]
        for number, text in enumerate(texts)
    ]


def app_of(backend: Backend, **settings: Any) -> FastAPI:
    return create_app(backend, Settings(**settings))


@contextmanager
def running(app: FastAPI, *, client_timeout: float = 60.0) -> Iterator[str]:
    """The address of the application behind a free port of this process."""
    listener = listen("127.0.0.1", 0, client_timeout)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
    thread.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
