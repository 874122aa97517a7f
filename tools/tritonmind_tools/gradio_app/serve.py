"""Serves the page: one process, nothing from other hosts, and no tunnel unless it was asked for."""

from __future__ import annotations

import os
import secrets

# Read by Gradio and by huggingface_hub when they are imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritonmind_tools.console_transport import Source
from tritonmind_tools.gradio_app import look
from tritonmind_tools.gradio_app.page import Page
from tritonmind_tools.gradio_app.session import Sessions, Watch

# Whatever an answer says, the visitor's browser asks nobody else for anything: no pictures, no scripts, no fonts.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _WithHeaders:
    """An ASGI application whose answers have _HEADERS too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_more)


def make_app(sessions: Sessions, watch: Watch, *, num_answers: int) -> FastAPI:
    """The page as an application, at /."""
    app = FastAPI(openapi_url=None)

    app.add_middleware(_WithHeaders)
    page = Page(sessions, watch, num_answers=num_answers)
    return gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        theme=look.theme(),
        css=look.CSS,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )


def serve(source: Source, *, host: str, port: int, num_answers: int, share: bool) -> None:
    """Serve until SIGINT or SIGTERM."""
    sessions = Sessions(source)
    app = make_app(sessions, Watch(source), num_answers=num_answers)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
    try:
        _Server(config, share=share).run()
    finally:
        sessions.close()


class _Server(uvicorn.Server):
    """Says where the page is once it can be opened."""

    def __init__(self, config: uvicorn.Config, *, share: bool) -> None:
        super().__init__(config)
        self._share = share

    async def startup(self, *args: object, **options: object) -> None:
        await super().startup(*args, **options)  # type: ignore[arg-type]
        if not self.started:
            return
        host, port = self.config.host, self.config.port
        if host in ("0.0.0.0", "::"):
            print(f"Ready for every machine that reaches this one, here at http://127.0.0.1:{port}", flush=True)
        else:
            print(f"Ready at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        if self._share:
            from gradio.networking import setup_tunnel

            url = setup_tunnel(
                local_host="127.0.0.1",
                local_port=port,
                share_token=secrets.token_urlsafe(32),
                share_server_address=None,
                share_server_tls_certificate=None,
            )
            print(f"Shared with everybody who knows it: {url}", flush=True)
