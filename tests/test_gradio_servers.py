"""The page of `serve gradio`, named as the tutorial does, over an engine, an API server and a Triton server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Chat, chromium, page_of
from tests.server_fixture import ENGINE_MODULE, make_workspace, need_server
from tests.terminal import environment
from tritonmind_tools.cli import build_parser, normalise
from tritonmind_tools.embedded_server import EmbeddedServer
from tritonmind_tools.gradio_app import open_source
from tritonmind_tools.ports import free_port

pytestmark = pytest.mark.server


@dataclass
class Lost:
    """A model's server: the words of `serve gradio` that name it, and how it goes and comes back."""

    words: list[str]
    kill: Callable[[], None]
    start: Callable[[], None]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = make_workspace(tmp_path_factory.mktemp("page"), eos_token_id=0, max_position_embeddings=30_000)
    # Id 0 alone, not the tokenizer's too: it does not come of this model, so an answer is as long as it may be.
    path = workspace / "triton_models" / "weights" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_ids": [0]}))
    return workspace


@contextmanager
def engine(workspace: Path) -> Iterator[Lost]:
    def kill() -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        (pid,) = (pid for pid in children if ENGINE_MODULE in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(int(pid), signal.SIGKILL)

    # The next question starts it.
    yield Lost([str(workspace), "--device", "cpu"], kill, lambda: None)


@contextmanager
def api_server(workspace: Path) -> Iterator[Lost]:
    port = free_port()
    command = [sys.executable, "-m", "tritonmind_tools.cli", "serve", "api_server", str(workspace)]
    running: list[subprocess.Popen[str]] = []

    def start() -> None:
        options = ["--server_port", str(port), "--engine_options", "num_threads=1"]
        running.append(subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment()))
        assert running[-1].stdout is not None
        assert any(f":{port}" in line for line in running[-1].stdout)

    def kill() -> None:
        running[-1].kill()
        running[-1].wait()

    start()
    yield Lost([f"http://0.0.0.0:{port}", "--server_name", "0.0.0.0", "--restful_api", "True"], kill, start)
    kill()


@contextmanager
def triton_server(workspace: Path) -> Iterator[Lost]:
    need_server()
    port = free_port()
    running: list[EmbeddedServer] = []

    def start() -> None:
        log_path = workspace / f"page-{len(running)}.log"
        running.append(EmbeddedServer(workspace, grpc_port=port, log_path=log_path))
        running[-1].start()

    start()
    yield Lost([f"localhost:{port}", "--server_name", "0.0.0.0"], lambda: running[-1].stop(), start)
    running[-1].stop()


@pytest.mark.parametrize("serving", [engine, api_server, triton_server])
def test_a_conversation_outlives_its_server(browser: Any, workspace: Path, serving: Callable[[Path], Any]) -> None:
    with serving(workspace) as server:
        args = build_parser().parse_args(normalise(["serve", "gradio", *server.words]))
        source = open_source(args)
        try:
            with page_of(source) as served:
                converse(Chat.open(browser, served.url), server)
        finally:
            source.close()


def converse(chat: Chat, server: Lost) -> None:
    chat.page.wait_for_selector(".tm-ready")
    chat.set(temperature="0", max_tokens="25000")
    chat.ask("hello")
    # Stopped as soon as it has begun: this model writes faster than a browser shows on a busy machine.
    chat.page.wait_for_function("document.querySelector('#tm-chat .bot.message')?.innerText.length > 0")
    chat.stop()
    chat.expect(".tm-note", "cancelled")
    chat.set(max_tokens="8")
    chat.press("Retry")
    chat.expect(".tm-note", "answer 8 tokens")
    chat.expect(".tm-note", "length")
    chat.ask("word " * 8000)
    chat.expect_answer("begin a new chat")
    server.kill()
    chat.ask("is anybody there?")
    chat.expect_answer("No answer.")
    chat.page.wait_for_selector(".tm-lost, .tm-ready")
    server.start()
    chat.press("Retry")
    chat.expect(".tm-note", "answer 8 tokens")
    chat.page.wait_for_selector(".tm-ready")
    assert chat.foreign == []
    chat.close()
