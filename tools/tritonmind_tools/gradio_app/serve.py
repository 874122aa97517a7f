"""Serves the page: one process, nothing from other hosts, and no tunnel unless it was asked for."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from types import FrameType
from typing import Any

# Read by Gradio and by huggingface_hub when they are imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritonmind_tools.console_transport import Source
from tritonmind_tools.gradio_app import look
from tritonmind_tools.gradio_app.page import Page
from tritonmind_tools.gradio_app.session import Sessions, Watch

_STOP_TIMEOUT_S = 3
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


def serve(source: Source, *, host: str, port: int, num_answers: int, share: bool) -> None:
    """Serve until SIGINT or SIGTERM, which raise KeyboardInterrupt when all connections have ended."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # uvicorn raises the signal that stopped it again.
    signal.signal(signal.SIGTERM, interrupt)
    PageServer(source, host=host, port=port, num_answers=num_answers, share=share).run()


class PageServer(uvicorn.Server):
    """The page of a source. It says where it is once it can be opened, and stops although pages are open."""

    def __init__(self, source: Source, *, host: str, port: int, num_answers: int, share: bool = False) -> None:
        """num_answers: how many may run at once, over all visitors. share: whether to open a public address."""
        self.sessions = Sessions(source, num_answers=num_answers)
        self._share = share
        page = Page(self.sessions, Watch(source))
        app = FastAPI(openapi_url=None)
        app.add_middleware(_WithHeaders)
        gr.mount_gradio_app(
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
        (self._gradio,) = (route.app for route in app.routes if isinstance(route, Mount))
        super().__init__(
            uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=_STOP_TIMEOUT_S)
        )

    async def startup(self, *args: Any, **options: Any) -> None:
        await super().startup(*args, **options)
        if not self.started:
            return
        host, port = self.config.host, self.config.port
        if host in ("0.0.0.0", "::"):
            print(f"Ready for every machine that reaches this one, here at http://127.0.0.1:{port}", flush=True)
        else:
            print(f"Ready at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        if self._share:
            print(f"Shared with whoever knows it: {_tunnel(port)}", flush=True)

    async def shutdown(self, *args: Any, **options: Any) -> None:
        # Each open page holds a connection by which Gradio would notice its end, and one for a running answer.
        self._gradio.stop_event.set()  # type: ignore[attr-defined]
        await asyncio.to_thread(self.sessions.close)
        await super().shutdown(*args, **options)


def _tunnel(port: int) -> str:
    """A public address for a local port, through Gradio's servers; it ends with this process."""
    from gradio.networking import setup_tunnel

    return setup_tunnel(
        local_host="127.0.0.1",
        local_port=port,
        share_token=secrets.token_urlsafe(32),
        share_server_address=None,
        share_server_tls_certificate=None,
    )
