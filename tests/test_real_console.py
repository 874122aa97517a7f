"""`tritonmind serve triton_client` in a terminal, against a real Triton server that comes and goes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.server_fixture import assert_accounts, make_workspace, running
from tests.terminal import Terminal, environment
from tritonmind_tools.embedded_server import EmbeddedServer

pytestmark = pytest.mark.server

COMMAND = [sys.executable, "-m", "tritonmind_tools.cli", "serve", "triton_client"]
GREEDY = ["--temperature", "0", "--ignore-eos"]


def test_a_conversation_outlives_its_server(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    with running(workspace) as server:
        address = server.address
        with Terminal([*COMMAND, address, *GREEDY], env=environment(), timeout=60) as terminal:
            terminal.expect(rf"connecting to {address} \.\.\.\nthe server at {address}\. An empty line sends")
            terminal.expect("^> ")
            terminal.type("/set max_tokens 8\nhello\n\n")
            terminal.expect(r"\[prompt \d+ tokens, 0 cached, answer 8 tokens, .*, length\]\n> ")
            terminal.type("word " * 3000 + "\n\n")
            terminal.expect(r"error: .*session_len is 4096.* the conversation before it counts: /undo")
            terminal.type("/set max_tokens\nhello again\n\n")
            terminal.expect("\ufffd")
            terminal.interrupt()
            terminal.expect(r"answer [1-9]\d* tokens, .*cancelled\]\n> ")
            server.stop()
            assert_accounts(server.log_path)
            terminal.type("/set max_tokens 8\nis anybody there?\n\n")
            terminal.expect(rf"error: (the connection to {address} is lost|no server answers at {address})")
            terminal.type("/retry\n")
            terminal.expect(f"error: no server answers at {address}")
            with EmbeddedServer(workspace, grpc_port=server.grpc_port, log_path=workspace / "second.log"):
                terminal.type("/retry\n")
                terminal.expect(r"answer 8 tokens, .*, length\]\n> ")
                terminal.type("exit\n")
                assert terminal.wait() == 0
