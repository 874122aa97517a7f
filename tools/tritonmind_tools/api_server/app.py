"""The HTTP application: routes, their limits, and how errors are told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from tritonmind import __version__
from tritonmind_tools.api_server import chat, completions, interactive, responses
from tritonmind_tools.api_server.backends import Backend
from tritonmind_tools.api_server.dialect import AUTO, find_dialect
from tritonmind_tools.api_server.errors import ApiError, refused, told
from tritonmind_tools.api_server.handlers import add_error_handlers
from tritonmind_tools.api_server.limits import ICON, PAGE_FILES, SCRIPT, STYLE, Limits
from tritonmind_tools.api_server.prometheus import CONTENT_TYPE
from tritonmind_tools.api_server.protocol import ChatBody, CompletionBody, EncodeBody, InteractiveBody
from tritonmind_tools.api_server.replies import Reply
from tritonmind_tools.api_server.response_input import ResponsesBody

DEFAULT_MAX_BODY_BYTES = 32 << 20
TITLE = "tritonmind"
DESCRIPTION = "OpenAI's API and LMDeploy's interactive route. See docs/api_server.md."


_ERRORS = {
    400: "a field is wrong, or not served",
    401: "an API key is missing or wrong",
    404: "the model or the session is not known",
    409: "the session has another request at work",
    413: "the body is too large",
    429: "too many requests are at work",
    503: "the model cannot answer now",
}


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """How every error is told."""

    error: ErrorDetails


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the server, not of the model. allow_origins: of browsers' pages (CORS); none without any."""

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    max_requests: int = 0
    allow_origins: tuple[str, ...] = ()
    allow_credentials: bool = False
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)
    tool_parser: str = AUTO
    reasoning_parser: str = AUTO


def create_app(backend: Backend, settings: Settings | None = None) -> FastAPI:
    """The application over a model. It connects to the model when it starts, and closes it when it ends."""
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.connect()
        yield

    app = FastAPI(
        title=TITLE,
        description=DESCRIPTION,
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={status: {"model": ErrorBody, "description": description} for status, description in _ERRORS.items()},
    )
    add_error_handlers(app)
    _add_generation(app, backend, settings)
    _add_rest(app, backend)
    app.add_middleware(
        Limits,
        api_keys=settings.api_keys,
        max_body_bytes=settings.max_body_bytes,
        max_requests=settings.max_requests,
    )
    _describe(app)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_credentials=settings.allow_credentials,
            allow_methods=settings.allow_methods,
            allow_headers=settings.allow_headers,
            expose_headers=[interactive.SESSION_HEADER],
        )
    return app


def _add_generation(app: FastAPI, backend: Backend, settings: Settings) -> None:
    """The routes that answer with what the model generates."""
    dialect = find_dialect(backend.model.chat_template, settings.tool_parser, settings.reasoning_parser)
    known = interactive.KnownSessions()

    @app.post("/v1/chat/completions", tags=["OpenAI"], summary="The next message of a conversation")
    async def chat_completions(body: ChatBody) -> Response:
        _check_model(backend, body.model)
        with told(chat.NAMES):
            answer = chat.ChatAnswer(body, backend, dialect)
        return Reply(answer.write, answer.names)

    @app.post("/v1/responses", tags=["OpenAI"], summary="The next message of a conversation, as items")
    async def model_responses(body: ResponsesBody) -> Response:
        _check_model(backend, body.model)
        with told(responses.NAMES):
            answer = responses.ResponsesAnswer(body, backend, dialect)
        return Reply(answer.write, answer.names)

    @app.post("/v1/completions", tags=["OpenAI"], summary="What follows a text")
    async def text_completions(body: CompletionBody) -> Response:
        _check_model(backend, body.model)
        with told(completions.NAMES):
            return Reply(completions.CompletionAnswer(body, backend).write, completions.NAMES)

    async def turn(body: InteractiveBody) -> Response:
        with told(interactive.NAMES):
            return Reply(interactive.InteractiveAnswer(body, backend, known).write, interactive.NAMES)

    for path in ("/v1/chat/interactive", "/generate"):
        app.post(path, tags=["LMDeploy"], summary="A turn of a session that the server remembers")(turn)


def _add_rest(app: FastAPI, backend: Backend) -> None:
    """The routes that answer by themselves."""
    card = {"id": backend.model.name, "object": "model", "created": backend.model.created, "owned_by": TITLE}
    if backend.model.max_model_len is not None:
        card["max_model_len"] = backend.model.max_model_len

    @app.get("/v1/models", tags=["OpenAI"], summary="The served model")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}", tags=["OpenAI"], summary="Facts of a model")
    async def one_model(model: str) -> dict[str, Any]:
        _check_model(backend, model)
        return card

    @app.post("/v1/encode", tags=["LMDeploy"], summary="Token ids of texts")
    def encode(body: EncodeBody) -> dict[str, Any]:  # no coroutine: a long text is read in a thread
        return _encoded(body, backend)

    @app.post("/v1/embeddings", tags=["OpenAI"], summary="Refused: the model generates text", include_in_schema=False)
    async def embeddings() -> Response:
        raise ApiError(
            400, f"{backend.model.name} generates text: embeddings are not served", code="unsupported_operation"
        )

    @app.head("/health", include_in_schema=False)  # what some load balancers ask
    @app.get("/health", tags=["server"], summary="200 when requests can be answered")
    async def health() -> Response:
        if await backend.is_ready():
            return JSONResponse({"status": "ready"})
        raise ApiError(503, "the model cannot answer now", type="server_error", code="unavailable")

    @app.get("/metrics", tags=["server"], summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(backend.metrics(), media_type=CONTENT_TYPE)

    # That package is needed for its files alone.
    app.mount(PAGE_FILES, StaticFiles(packages=[("fastapi_offline", "static")]))
    for path in ("/", "/docs"):

        @app.get(path, include_in_schema=False)
        async def swagger() -> HTMLResponse:
            return get_swagger_ui_html(
                openapi_url="/openapi.json",
                title=TITLE,
                swagger_js_url=SCRIPT,
                swagger_css_url=STYLE,
                swagger_favicon_url=ICON,
            )


def _describe(app: FastAPI) -> None:
    """The OpenAPI description, without FastAPI's 422, which is a 400 here."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        description = original()
        for path in description["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return description

    app.openapi = openapi  # type: ignore[method-assign]


def _encoded(body: EncodeBody, backend: Backend) -> dict[str, Any]:
    """LMDeploy's answer: lists for a list, else flat."""
    tokenizer, template = backend.model.tokenizer, backend.model.chat_template
    if tokenizer is None:
        raise ApiError(
            400, "/v1/encode needs the tokenizer, which a Triton server keeps to itself", code="unsupported_operation"
        )
    texts = body.input if isinstance(body.input, list) else [body.input]
    ids = []
    for text in texts:
        if not body.do_preprocess:
            ids.append(tokenizer.encode(text, add_special_tokens=body.add_bos))
        elif template is None:
            raise refused("do_preprocess", "this model has no chat template")
        else:
            prompt = template.render([{"role": "user", "content": text}])
            ids.append(tokenizer.encode(prompt, add_special_tokens=False))
    if isinstance(body.input, list):
        return {"input_ids": ids, "length": [len(each) for each in ids]}
    return {"input_ids": ids[0], "length": len(ids[0])}


def _check_model(backend: Backend, name: str) -> None:
    if name != backend.model.name:
        raise ApiError(
            404,
            f"model: {name[:200]!r} is not served here, {backend.model.name!r} is",
            param="model",
            code="model_not_found",
        )
