"""`tritonmind chat` on a tiny model: from a workspace and from its checkpoint, in a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.terminal import Terminal, environment
from tests.workspaces import tiny_workspace

COMMAND = [sys.executable, "-m", "tritonmind_tools.cli", "chat"]
GREEDY = ["--device", "cpu", "--temperature", "0", "--ignore-eos"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    workspace = tiny_workspace(directory)
    return {"workspace": workspace, "checkpoint": directory / "checkpoint"}


def piped(*arguments: str, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], input=text, capture_output=True, text=True, env=environment(), timeout=120
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_workspace_and_checkpoint_say_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    before = sorted(models["checkpoint"].rglob("*"))
    options = [*GREEDY, "--dtype", "fp32", "--max-tokens", "12"]
    files = {name: tmp_path / f"{name}.json" for name in models}
    for name, path in models.items():
        done = piped(str(path), *options, text=f"one\n\ntwo\nlines\n\n/save {files[name]}\n")
        assert done.returncode == 0, done.stderr
        assert len(re.findall(r"^\[prompt \d+ tokens, \d+ cached, answer 12 tokens, ", done.stderr, re.M)) == 2
    talk = json.loads(files["checkpoint"].read_text())
    assert talk == json.loads(files["workspace"].read_text())
    assert [message["content"] for message in talk if message["role"] == "user"] == ["one", "two\nlines"]
    assert len({message["content"] for message in talk}) == 4
    assert sorted(models["checkpoint"].rglob("*")) == before


@pytest.mark.parametrize("source", ["workspace", "checkpoint"])
def test_a_conversation_in_a_terminal(models: dict[str, Path], source: str) -> None:
    arguments = ["turbomind", str(models[source]), *GREEDY, "--session-len", "200"]
    with Terminal([*COMMAND, *arguments], timeout=120) as terminal:
        terminal.expect(rf"loading {re.escape(str(models[source]))} \.\.\.")
        terminal.expect(r"on cpu in float32, 200 tokens of context\. An empty line sends")
        terminal.expect("^> ")
        terminal.type("/set max_tokens 8\nhello\n\n")
        terminal.expect(r"\[prompt (\d+) tokens, 0 cached, answer 8 tokens, .*, length\]\n> ")
        terminal.type("hello again\n\n")
        terminal.expect(r"\[prompt \d+ tokens, \d+ cached, answer 8 tokens, .*, length\]\n> ")
        # What is asked here is longer than the context.
        terminal.type("word " * 60 + "\n\n")
        terminal.expect(
            r"error: prompt='\d+ tokens' is invalid: session_len is 200 .* the conversation before it counts: /undo"
        )
        terminal.type("end\n")
        terminal.expect("the conversation is forgotten")
        terminal.type("hello\n\n")
        terminal.expect(r"\[prompt \d+ tokens, \d+ cached, answer 8 tokens, .*, length\]\n> ")
        terminal.type("exit\n")
        assert terminal.wait() == 0


def test_ctrl_c_cancels_in_the_engine_too(models: dict[str, Path]) -> None:
    with Terminal([*COMMAND, str(models["checkpoint"]), *GREEDY, "--session-len", "500000"], timeout=120) as terminal:
        terminal.expect("^> ")
        terminal.type("hello\n\n")
        terminal.expect("\ufffd")
        terminal.interrupt()
        terminal.expect(r"answer [1-9]\d* tokens, .*cancelled\]\n> ")
        # There is one slot: an answer that went on would keep it for minutes.
        terminal.type("/set max_tokens 5\nend\nhello\n\n")
        terminal.expect(r"answer 5 tokens, .*, length\]\n> ")


def test_an_engine_that_died_is_started_again(models: dict[str, Path]) -> None:
    with Terminal([*COMMAND, str(models["checkpoint"]), *GREEDY, "--max-tokens", "5"], timeout=120) as terminal:
        terminal.expect("^> ")
        (engine,) = children(terminal.process.pid)
        os.kill(engine, signal.SIGKILL)
        terminal.type("hello\n\n")
        terminal.expect(r"error: .*killed by signal 9.*; the next question starts the engine again")
        terminal.type("/retry\n")
        terminal.expect(r"answer 5 tokens, .*, length\]\n> ")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["nowhere"],
            "nowhere does not exist: give a workspace, a checkpoint's directory, a .gguf file or",
        ),
        (["one", "two"], "one PATH is expected, not 2: one two"),
        (["nowhere", "--temperature", "-1"], "temperature=-1.0 is invalid: must be 0 (the likeliest token) to 1000"),
    ],
)
def test_what_cannot_start_says_why(arguments: list[str], problem: str) -> None:
    done = piped(*arguments, text="hi\n")
    assert done.returncode == 1 and problem in done.stderr and "Traceback" not in done.stderr


def test_a_model_without_a_template_cannot_chat(models: dict[str, Path], tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path)
    (workspace / "triton_models" / "tokenizer" / "chat_template.jinja").unlink()
    done = piped(str(workspace), "--device", "cpu", text="hi\n")
    assert done.returncode == 1 and f"{workspace} has no chat template" in done.stderr
