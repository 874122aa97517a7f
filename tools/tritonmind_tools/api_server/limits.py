"""What a request must pass before a route sees it: its key, its size, and how many others are at work."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritonmind_tools.api_server.errors import ApiError

# Open to whoever reaches the port: a probe, the description of the routes, and the page that shows it, with its files.
PAGE_FILES = "/page-files"
SCRIPT, STYLE, ICON = (f"{PAGE_FILES}/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"))
OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/health", SCRIPT, STYLE, ICON})
BODY_TIMEOUT_S = 60.0


class Limits:
    """ASGI middleware. Refuses with OpenAI's error objects, and counts what it lets through.

    api_keys: one of them must come as a bearer token; none are asked for if there are none. max_body_bytes: of a
    request's content. max_requests: POST requests at work at once, 0 for any number.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        max_body_bytes: int,
        max_requests: int,
    ) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._max_requests = max_requests
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_post = scope["method"] == "POST"
        try:
            self._check_key(scope)
            if is_post:
                self._check_number()
        except ApiError as error:
            await _refuse(error, send)
            return
        if not is_post:
            await self._app(scope, receive, send)
            return
        self._num_requests += 1
        try:
            try:
                body = await self._body(scope, receive)
            except ApiError as error:
                await _refuse(error, send)
                return
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
        finally:
            self._num_requests -= 1

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not token:
            raise ApiError(401, "send an API key: Authorization: Bearer KEY", code="invalid_api_key")
        given = _digest(token.strip())
        if not any(hmac.compare_digest(given, key) for key in self._keys):
            raise ApiError(401, "this API key is not one of this server's", code="invalid_api_key")

    def _check_number(self) -> None:
        if self._max_requests and self._num_requests >= self._max_requests:
            raise ApiError(
                429,
                f"{self._num_requests} requests are at work, as many as --max-concurrent-requests allows",
                type="rate_limit_error",
                code="rate_limit_exceeded",
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The request's content, None if its client left before the end. Raises ApiError."""
        too_large = ApiError(
            413, f"a request may have {self._max_body_bytes} bytes (--max-body-size)", code="request_too_large"
        )
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise too_large
        parts: list[bytes] = []
        size = 0
        more = True
        deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT_S
        while more:
            try:
                left = deadline - asyncio.get_running_loop().time()
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except asyncio.TimeoutError:
                raise ApiError(408, f"the request was not complete after {BODY_TIMEOUT_S:g} s") from None
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise too_large
            more = message.get("more_body", False)
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the content that was read, then what comes after it."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


def _digest(key: bytes) -> bytes:
    """Of one length for all keys, so that comparing tells nothing about theirs."""
    return hashlib.sha256(key).digest()


async def _refuse(error: ApiError, send: Send) -> None:
    from tritonmind_tools.api_server.replies import Writer

    await Writer(send).fail(error)
