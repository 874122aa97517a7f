"""How an answer leaves: one JSON object, server-sent events or lines of JSON; and what happens when its client goes.

A route makes a Reply out of a coroutine that writes to a Writer. The coroutine is cancelled as soon as the client has
gone, which closes the answer that it iterates over, and that cancels the request in the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tritonmind_tools.api_server.errors import ApiError, api_error

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
JSON_LINES = "application/x-ndjson"
DONE = b"data: [DONE]\n\n"

log = logging.getLogger("tritonmind.api")

encode_json = msgspec.json.Encoder().encode


def event(value: Any) -> bytes:
    """A server-sent event of JSON."""
    return b"data: " + encode_json(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """The same with a name, as the Responses API has them."""
    return b"event: " + name.encode() + b"\ndata: " + encode_json(value) + b"\n\n"


class Writer:
    """One HTTP response in the making."""

    def __init__(self, send: Send) -> None:
        self.media_type: str | None = None  # once it has begun
        self._send = send

    async def whole(self, content: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """A response of JSON, at once."""
        await self._start(status, JSON, {"content-length": str(len(content)), **(headers or {})})
        await self._send({"type": "http.response.body", "body": content})

    async def begin(self, media_type: str, headers: Mapping[str, str] | None = None) -> None:
        """The head of a response that comes in pieces."""
        await self._start(200, media_type, {"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})

    async def write(self, piece: bytes) -> None:
        """A piece. Waits while the client reads slower than we write."""
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, piece: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": piece})

    async def fail(self, error: ApiError) -> None:
        """An error as the response, or, in one that has begun, as its last piece."""
        if self.media_type is None:
            await self.whole(error.content, status=error.status, headers=error.headers)
        else:
            await self.end(event(error.body) if self.media_type == EVENT_STREAM else error.content + b"\n")

    async def _start(self, status: int, media_type: str, headers: Mapping[str, str]) -> None:
        self.media_type = media_type
        if media_type != JSON:
            media_type += "; charset=utf-8"
        raw = [(name.encode(), value.encode()) for name, value in {"content-type": media_type, **headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


class Reply(Response):
    """A response that a coroutine writes. names: fields of ours by what the route calls them, for errors."""

    def __init__(self, produce: Callable[[Writer], Awaitable[None]], names: dict[str, str] | None = None) -> None:
        super().__init__()
        self._produce = produce
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        producing = asyncio.ensure_future(self._run(Writer(send)))
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({producing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (producing, leaving):
                task.cancel()
            await asyncio.wait({producing})
        if not producing.cancelled():
            producing.result()

    async def _run(self, writer: Writer) -> None:
        try:
            await self._produce(writer)
        except Exception as error:
            told = api_error(error, self._names)
            if told.status == 500:
                log.exception("a request failed")
            await writer.fail(told)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
