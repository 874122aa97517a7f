"""The console over a transport that is told what to say: manners and commands, in a pipe and in a terminal."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fake_transport import FakeTransport
from tests.terminal import CTRL_D, Terminal, environment

from tritonmind_tools.console import Console
from tritonmind_tools.console_screen import Screen
from tritonmind_tools.console_transport import Delta, statistics
from tritonmind_tools.conversation import Turn

FAKE = [sys.executable, "-m", "tests.fake_transport"]


class Talk:
    """A console whose whole input is given."""

    def __init__(self, text: str, *, system: str | None = None, show_statistics: bool = True) -> None:
        self.transport = FakeTransport()
        output, notes = io.StringIO(), io.StringIO()
        screen = Screen(io.StringIO(text), output, notes, interactive=False)
        self.console = Console(self.transport, screen, system=system, show_statistics=show_statistics)
        self.exit_code = self.console.run()
        self.output, self.notes = output.getvalue(), notes.getvalue()


def asked(text: str) -> list[str]:
    return [messages[-1]["content"] for messages in Talk(text).transport.seen]


@pytest.mark.parametrize(
    ("text", "questions"),
    [
        ("one", ["one"]),
        ("one\n", ["one"]),
        ("one\ntwo\n\nthree", ["one\ntwo", "three"]),
        ("\n \none\r\n\t\n\n\ntwo\n\n", ["one", "two"]),
        ("  indented\nexit\nend\n/set\n", ["  indented\nexit\nend\n/set"]),
        (" /etc is a folder\n\n", [" /etc is a folder"]),
        ("one\n\nexit\nnever\n", ["one"]),
        ("exit now\n\nend it\n", ["exit now", "end it"]),
        ("", []),
    ],
)
def test_an_empty_line_sends(text: str, questions: list[str]) -> None:
    assert asked(text) == questions


def test_the_model_sees_the_whole_conversation() -> None:
    talk = Talk("hi\n\nand then\n", system="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    first = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "said: hi"}]
    assert talk.transport.seen == [[system, first[0]], [system, *first, {"role": "user", "content": "and then"}]]
    assert talk.output == "said: hi\nsaid: and then\n"
    assert talk.exit_code == 0


def test_end_and_clear_forget_but_options_stay() -> None:
    for command in ("end", "/clear"):
        talk = Talk(f"/set seed 5\none\n\n{command}\ntwo\n")
        assert [len(messages) for messages in talk.transport.seen] == [1, 1]
        assert talk.transport.options == [{"seed": 5}] * 2


def test_a_failed_answer_is_no_history_and_shows_in_the_exit_code() -> None:
    talk = Talk("fail\n\nfine\n")
    assert talk.exit_code == 1
    assert talk.transport.seen[1] == [{"role": "user", "content": "fine"}]
    assert "error: top_p=2.0 is invalid: must be above 0 and at most 1\n" in talk.notes
    assert talk.output == "begun \nsaid: fine\n"


def test_a_prompt_too_long_says_what_to_do() -> None:
    talk = Talk("one\n\nlong\n\nend\nlong\n")
    errors = [line for line in talk.notes.splitlines() if line.startswith("error: ")]
    assert all("600 tokens" in line and "session_len is 512" in line for line in errors)
    assert "the conversation before it counts: /undo takes the last turn back, /clear forgets all" in errors[0]
    assert errors[1].endswith("shorten the question")


def test_undo_and_retry() -> None:
    talk = Talk("one\n\ntwo\n\n/undo\n/retry\nthree\n")
    contents = [[message["content"] for message in messages] for messages in talk.transport.seen]
    assert contents == [["one"], ["one", "said: one", "two"], ["one"], ["one", "said: one", "three"]]
    assert talk.console.talk.turns == [Turn("one", "said: one"), Turn("three", "said: three")]
    assert "taken back: two\n" in talk.notes


def test_retry_repeats_a_question_that_failed() -> None:
    talk = Talk("one\n\nlong\n\n/undo\n/retry\n")
    contents = [[message["content"] for message in messages] for messages in talk.transport.seen]
    assert contents == [["one"], ["one", "said: one", "long"], ["long"]]


def test_system_message_is_set_and_taken_away() -> None:
    talk = Talk("/system Speak French.\none\n\n/system\none\n")
    roles = [[message["role"] for message in messages] for messages in talk.transport.seen]
    assert roles == [["system", "user"], ["user", "assistant", "user"]]
    assert talk.transport.seen[0][0]["content"] == "Speak French."


def test_sampling_options_are_those_of_sampling_params() -> None:
    talk = Talk(
        '/set temperature 0.7\n/set stop ["a", "b"]\n/set ignore_eos true\n/set top_k 4\n/set top_k\nx\n\n/params\n'
    )
    assert talk.transport.options == [{"temperature": 0.7, "stop": ("a", "b"), "ignore_eos": True}]
    assert re.search(r"^temperature +0\.7$", talk.notes, re.M) and re.search(r"^top_k +default$", talk.notes, re.M)
    assert talk.exit_code == 0


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("/set temperature -1", "temperature=-1.0 is invalid: must be 0 (the likeliest token) to 1000"),
        ("/set top_k much", "top_k='much' is invalid: must be a whole number"),
        ("/set warmth 1", "name='warmth' is invalid: unknown option; known are max_tokens, "),
        ("/set warmth", "name='warmth' is invalid: unknown option"),
        ("/set", "/set needs a name, as in: /set temperature 0.7"),
        ("/save", "/save needs a file"),
        ("/save /nowhere/talk.json", "No such file or directory: '/nowhere/talk.json'"),
        ("/etc is a folder", "unknown command /etc: /help lists them"),
        ("/undo", "nothing was asked yet"),
        ("/retry", "nothing was asked yet"),
    ],
)
def test_a_wrong_command_is_named_and_the_console_lives_on(command: str, problem: str) -> None:
    talk = Talk(f"{command}\nfine\n")
    assert "error: " in talk.notes and problem in talk.notes
    assert (talk.transport.options, talk.exit_code) == ([{}], 1)


def test_sessions_are_conversations_beside_each_other() -> None:
    talk = Talk("/system s\none\n\n/session other\ntwo\n\n/session 1\n/session\nthree\n")
    contents = [[message["content"] for message in messages] for messages in talk.transport.seen]
    assert contents == [["s", "one"], ["s", "two"], ["s", "one", "said: one", "three"]]
    assert "session other: 0 turns\nsession 1: 1 turns\n* 1: 1 turns\n  other: 1 turns\n" in re.sub(
        r"\[.*\]\n", "", talk.notes
    )


def test_save_writes_messages_and_replaces_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a talk.json"
    talk = Talk(f"Größe?\n\n/save {file}\n/undo\n/save {file}\n", system="s")
    assert [message["content"] for message in json.loads(file.read_text())] == ["s", "Größe?", "said: Größe?"]
    assert f"{file} exists already: choose another name" in talk.notes


def test_history_and_help() -> None:
    talk = Talk("one\n\n/history\n/help\n")
    assert talk.output == "said: one\none\nsaid: one\n"
    assert "user:" in talk.notes and "assistant:" in talk.notes
    for word in ("/system TEXT", "/set NAME VALUE", "/params", "/retry", "/save FILE", "end", "exit", "(empty line)"):
        assert re.search(rf"^{re.escape(word)} +\w", talk.notes, re.M), word


def test_statistics_line() -> None:
    arrivals = [
        (0.5, Delta(text="a", num_tokens=2, num_input_tokens=30, num_cached_tokens=20)),
        (1.0, Delta(text="b", num_tokens=3, num_input_tokens=30, num_cached_tokens=20)),
        (2.5, Delta(text="c", num_tokens=5, num_input_tokens=30, num_cached_tokens=20, finish_reason="length")),
        (2.6, Delta()),
    ]
    line = "[prompt 30 tokens, 20 cached, answer 10 tokens, 4.0 tok/s, first after 0.50 s, length]"
    assert statistics(arrivals) == line
    assert statistics([(0.1, Delta(finish_reason="cancelled"))]).endswith("answer 0 tokens, cancelled]")
    assert "[prompt" not in Talk("one\n", show_statistics=False).notes


def test_a_pipe_gets_no_escape_code() -> None:
    for extra in ({}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}):
        done = subprocess.run(
            FAKE, input="one\ntwo\n\n/help\nfail", capture_output=True, text=True, env=environment(**extra), timeout=60
        )
        assert done.stdout == "said: one\ntwo\nbegun \n"
        assert "error: top_p=2.0" in done.stderr and "[prompt 7 tokens, 0 cached" in done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert done.returncode == 1


def test_an_interrupt_ends_a_pipe() -> None:
    with subprocess.Popen(
        FAKE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"slow\n\n")
        process.stdin.flush()
        assert process.stdout.read(5) == b"word0"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGINT


def test_a_terminal_conversation() -> None:
    with Terminal(FAKE) as terminal:
        terminal.expect(r"waking a fake \.\.\.\na fake\. An empty line sends, /help lists the commands, exit leaves\.")
        terminal.expect("> ")
        terminal.type("first line\n")
        terminal.expect(r"^\. ")
        terminal.type("second line\n\n")
        terminal.expect("^said: first line\nsecond line\n")
        terminal.expect(r"\[prompt 7 tokens, 0 cached, answer 5 tokens, .* first after [\d.]+ s, stop\]\n> ")
        terminal.type("/set top_p 7\n")
        terminal.expect(r"error: top_p=7\.0 is invalid")
        terminal.type("lost\n\n")
        terminal.expect(r"error: the connection is lost .*\n> ")
        terminal.type("again\n\n")
        terminal.expect("said: again\n.prompt 21 tokens, 14 cached")
        assert "\x1b[2m" in terminal.raw and "\x1b[31m" in terminal.raw
        terminal.type("exit\n")
        assert terminal.wait() == 0


def test_ctrl_c_cancels_the_answer_only() -> None:
    with Terminal(FAKE) as terminal:
        terminal.expect("> ")
        for _ in range(2):
            terminal.type("slow\n\n")
            terminal.expect("word2 ")
            terminal.interrupt()
            terminal.expect(r"cancelled\]\n> ")
        terminal.type("/history\n")
        terminal.expect("assistant:\nword0 word1 word2")
        terminal.type("on\n\n")
        terminal.expect("said: on\n.prompt 35 tokens")


def test_a_question_cancelled_before_a_word_came_is_not_history() -> None:
    with Terminal(FAKE) as terminal:
        terminal.expect("> ")
        terminal.type("silent\n\n")
        terminal.expect(r"^\. \n")
        terminal.interrupt()
        terminal.expect(r"cancelled\]\n> ")
        terminal.type("on\n\n")
        terminal.expect("said: on\n.prompt 7 tokens")


def test_a_second_ctrl_c_leaves_an_answer_that_does_not_hear() -> None:
    with Terminal(FAKE) as terminal:
        terminal.expect("> ")
        terminal.type("deaf\n\n")
        terminal.expect("begun ")
        terminal.interrupt()
        terminal.interrupt()
        terminal.expect(r"answer 1 tokens, .*cancelled\]\n> ")
        terminal.type("/history\n")
        terminal.expect("assistant:\nbegun ")
        terminal.type("on\n\n")
        terminal.expect("said: on\n.prompt 21 tokens")


@pytest.mark.parametrize("key", ["Ctrl-C", "Ctrl-D"])
@pytest.mark.parametrize("typed", ["", "a line\n"])
def test_keys_at_the_prompt_leave(key: str, typed: str) -> None:
    with Terminal(FAKE) as terminal:
        terminal.expect("> ")
        terminal.type(typed)
        if typed:
            terminal.expect(r"^\. ")
        if key == "Ctrl-C":
            terminal.interrupt()
        else:
            terminal.type(CTRL_D)
        assert terminal.wait() == 0
        assert "said" not in terminal.screen and terminal.screen.endswith("\n")


def test_a_models_text_cannot_steer_the_terminal() -> None:
    with Terminal(FAKE) as terminal:
        terminal.expect("> ")
        terminal.type("red\x16\x1b[31m\n\n")  # Ctrl-V enters the escape character as it is
        terminal.expect("said: red\ufffd\\[31m\n")


def test_a_wrong_option_is_refused_before_anything_starts() -> None:
    done = subprocess.run([*FAKE, "--top-p", "2"], capture_output=True, text=True, env=environment(), timeout=60)
    assert "top_p=2.0 is invalid: must be above 0 and at most 1" in done.stderr and not done.stdout
    assert done.returncode == 1


def test_no_colour_when_asked_so() -> None:
    with Terminal(FAKE, env=environment(NO_COLOR="1")) as terminal:
        terminal.expect("> ")
        terminal.type("fail\n\n")
        terminal.expect("error: top_p")
        assert not re.search(r"\x1b\[3[0-9]m", terminal.raw)
