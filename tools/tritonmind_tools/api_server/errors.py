"""Errors as OpenAI's API tells them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from tritonmind.errors import (
    BusyError,
    CancelledError,
    ConfigError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    TritonmindError,
    UnavailableError,
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RETRY_AFTER_S = 1
# The texts of errors about a prompt that leaves no room for an answer have the limit in them.
_CONTEXT_LIMIT = "session_len is "
# By the kind of our own errors: status, type, code. The first that fits counts.
_KINDS: tuple[tuple[type[TritonmindError], int, str, str | None], ...] = (
    (InvalidRequestError, 400, INVALID_REQUEST, "invalid_value"),
    (ConfigError, 400, INVALID_REQUEST, "invalid_value"),
    (NotFoundError, 404, INVALID_REQUEST, "not_found"),
    (BusyError, 409, INVALID_REQUEST, "session_busy"),
    (DeadlineError, 504, SERVER_ERROR, "deadline_exceeded"),
    (UnavailableError, 503, SERVER_ERROR, "unavailable"),
    (CancelledError, 499, SERVER_ERROR, "cancelled"),
)


class ApiError(Exception):
    """An error as a client sees it. param: the field it is about. retry: whether the same request may work later."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    @property
    def content(self) -> bytes:
        return msgspec.json.encode(self.body)

    @property
    def headers(self) -> dict[str, str]:
        """Beside the content's own."""
        headers = {"retry-after": str(RETRY_AFTER_S)} if self.status in (409, 429, 503) else {}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def api_error(error: BaseException, names: dict[str, str] | None = None) -> ApiError:
    """What a client is told of `error`. names: fields of ours by what the route calls them."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, TritonmindError):
        return ApiError(500, f"internal error: {type(error).__name__}", type=SERVER_ERROR, code="internal_error")
    message = str(error)
    for kind, status, error_type, code in _KINDS:
        if isinstance(error, kind):
            param = getattr(error, "field", None)
            if param is not None and names and param in names:
                message = names[param] + message.removeprefix(param)
                param = names[param]
            if status == 400 and _CONTEXT_LIMIT in message:
                code = "context_length_exceeded"
            return ApiError(status, message, type=error_type, param=param, code=code)
    return ApiError(500, message, type=SERVER_ERROR, code="internal_error")


def refused(param: str, message: str, *, code: str = "unsupported_value") -> ApiError:
    """A 400 for what this server cannot do, naming the field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


@contextmanager
def told(names: dict[str, str]) -> Iterator[None]:
    """Turn errors of ours into a client's, with the names of a route. names: see `api_error`."""
    try:
        yield
    except TritonmindError as error:
        raise api_error(error, names) from None
