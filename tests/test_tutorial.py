"""The tutorial's commands as docs/tutorial.md has them, on a tiny model, each in the place of the user who types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkpoints import make_llama_checkpoint
from tests.server_fixture import need_server
from tests.terminal import ROOT, Terminal, environment
from tests.workspaces import convert
from tritonmind_tools.ports import free_port, port_holder

pytestmark = pytest.mark.server

DOCUMENT = (ROOT / "docs" / "tutorial.md").read_text()
CHAT = "tritonmind chat turbomind ./workspace"
API_SERVER = """tritonmind serve api_server ./workspace \\
    --server_name 0.0.0.0 \\
    --server_port 23333 \\
    --instance_num 64 \\
    --tp 1"""
API_CLIENT = "tritonmind serve api_client http://localhost:23333"
GRADIO_API = """tritonmind serve gradio http://0.0.0.0:23333 \\
    --server_name 0.0.0.0 \\
    --server_port 6006 \\
    --restful_api True"""
GRADIO_LOCAL = "tritonmind serve gradio ./workspace"
TRITON = "bash workspace/service_docker_up.sh"
TRITON_CLIENT = "tritonmind serve triton_client localhost:33337"
GRADIO_TRITON = """tritonmind serve gradio localhost:33337 \\
    --server_name 0.0.0.0 \\
    --server_port 6006"""
COMMANDS = (CHAT, API_SERVER, API_CLIENT, GRADIO_API, GRADIO_LOCAL, TRITON, TRITON_CLIENT, GRADIO_TRITON)
# The tutorial's ports, or others where they are taken.
PORTS = {port: port if port_holder(port) is None else free_port() for port in (23333, 33337, 6006)}
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user: it holds `workspace`, and `tritonmind` is on the PATH."""
    home = tmp_path_factory.mktemp("home")
    make_llama_checkpoint(home / "checkpoint", max_position_embeddings=4096)
    convert(home / "checkpoint", home / "workspace", "--weight-type", "fp32", model_name="internlm-chat-7b")
    script = home / "bin" / "tritonmind"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m tritonmind_tools.cli "$@"\n')
    script.chmod(0o755)
    return home


def shell(home: Path, command: str) -> tuple[list[str], dict[str, str]]:
    """What runs a command of the tutorial in the user's folder, and its environment."""
    for port, ours in PORTS.items():
        command = command.replace(str(port), str(ours))
    if command.startswith("bash ") and (ours := PORTS[33337]) != 33337:
        command += f" --grpc-port {ours}"
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = environment(PATH=path, XDG_CACHE_HOME=str(home / "cache"), OMP_NUM_THREADS="1")
    return ["bash", "-c", f"cd {home} && exec {command}"], env


def talk(home: Path, command: str, greeting: str) -> None:
    """Ask one question in a console, and leave as the tutorial says."""
    words, env = shell(home, command)
    with Terminal(words, env=env, timeout=TIMEOUT_S) as terminal:
        terminal.expect(greeting)
        terminal.expect("^> ")
        terminal.type("/set max_tokens 6\n你好啊兄嘚\n\n")
        terminal.expect(r"\[prompt \d+ tokens, .*answer \d tokens, .*first after [\d.]+ s, (length|stop)\]\n> ")
        terminal.type("exit\n\n")
        assert terminal.wait() == 0


@contextmanager
def serving(home: Path, command: str, ready: str) -> Iterator[None]:
    """A server that is ready when it has said `ready`; Ctrl-C ends it."""
    words, env = shell(home, command)
    with Terminal(words, env=env, timeout=TIMEOUT_S) as terminal:
        terminal.expect(ready)
        yield
        terminal.interrupt()
        terminal.wait()


def fetch(url: str, body: object = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return answer.status, answer.read().decode()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_the_document_has_the_commands() -> None:
    for command in COMMANDS:
        assert command in DOCUMENT, command
    shown = re.findall(r"^tritonmind (?:serve \w+|chat)", DOCUMENT, re.M)
    assert {"tritonmind serve api_server", "tritonmind serve gradio", "tritonmind chat"} <= set(shown)


def test_local_chat(home: Path) -> None:
    talk(home, CHAT, r"internlm-chat-7b on \w+ in float32, 4096 tokens of context")


def test_api_server_its_client_and_its_page(home: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    port, page = PORTS[23333], PORTS[6006]
    with serving(home, API_SERVER, rf"http://.*:{port}"):
        status, text = fetch(f"http://127.0.0.1:{port}/v1/models")
        assert status == 200 and json.loads(text)["data"]
        body = json.loads(re.findall(r"```json\n(.*?)```", DOCUMENT, re.S)[0])
        status, text = fetch(f"http://127.0.0.1:{port}/v1/chat/completions", body | {"max_tokens": 6})
        assert status == 200 and json.loads(text)["usage"]["completion_tokens"] <= 6
        status, text = fetch(f"http://127.0.0.1:{port}/")
        assert status == 200 and "swagger" in text.lower()
        talk(
            home, API_CLIENT, rf"connecting to http://localhost:{port} \.\.\.\n.* at http://localhost:{port}\. An empty"
        )
        with serving(home, GRADIO_API, rf"Ready .*:{page}"):
            status, text = fetch(f"http://127.0.0.1:{page}/")
            assert status == 200 and "tritonmind" in text


def test_the_appendix(home: Path) -> None:
    need_server()
    if shutil.which("docker") and shutil.which("nvidia-smi"):
        pytest.skip("the script would take Docker's container, which has another image")
    port = PORTS[33337]
    with serving(home, TRITON, rf"Ready after [\d.]+ s[^\n]*\n.*serve triton_client .*:{port}"):
        talk(home, TRITON_CLIENT, rf"connecting to localhost:{port} \.\.\.\nthe server at localhost:{port}\. An empty")


def test_a_model_that_is_not_there(home: Path) -> None:
    words, env = shell(home, f"tritonmind serve gradio ./nowhere --server_port {free_port()}")
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1 and "nowhere does not exist" in done.stderr and "Traceback" not in done.stderr
