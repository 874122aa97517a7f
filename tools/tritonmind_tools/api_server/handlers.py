"""Every failure that no route has answered, as OpenAI's error object."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tritonmind.errors import TritonmindError
from tritonmind_tools.api_server.errors import INVALID_REQUEST, ApiError, api_error
from tritonmind_tools.api_server.replies import JSON

MAX_SHOWN = 64  # characters of a name that a client made up

log = logging.getLogger("tritonmind.api")


def add_error_handlers(app: FastAPI) -> None:
    """What a client did wrong is told; what we did wrong is logged and told as a 500."""

    async def own(request: Request, error: Exception) -> Response:
        return _response(api_error(error))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _response(_invalid(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.scope["path"][:200]  # not its url, which may have a Host that is none
        messages = {
            400: "the body cannot be read: send JSON in UTF-8",
            404: f"there is no {path} here: / lists the routes",
            405: f"{request.method} is not what {path} takes",
        }
        message = messages.get(error.status_code, str(error.detail))
        response = _response(ApiError(error.status_code, message, type=INVALID_REQUEST, code="invalid_request"))
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
        return _response(api_error(error))

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(TritonmindError, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


def _response(error: ApiError) -> Response:
    return Response(error.content, status_code=error.status, media_type=JSON, headers=error.headers)


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """pydantic's first error about a body."""
    first = errors[0]
    kind, location = first["type"], [part for part in first["loc"] if part != "body"]
    if kind == "json_invalid":
        return ApiError(
            400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="invalid_json"
        )
    if not location:
        return ApiError(
            400, "the body must be a JSON object, sent as Content-Type: application/json", code="invalid_json"
        )
    param = _shown(location)
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}: it would have no effect", param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    code = "unsupported_value" if kind == "value_error" else "invalid_value"
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def _shown(location: Sequence[Any]) -> str:
    """A place in a body: stop[0], stream_options.include_usage."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")[:MAX_SHOWN].encode(errors="replace").decode()
