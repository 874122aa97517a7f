"""A conversation in a terminal or a pipe, over any Transport. Needs neither torch nor a server.

Lines are collected until an empty one sends them. A first line that begins with '/' is a command, `exit` leaves and
`end` forgets the conversation. The history lives here, one for each session; the model sees all of it with each turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tritonmind.errors import ConfigError, TritonmindError
from tritonmind.sampling_params import SamplingParams
from tritonmind_tools.console_options import (
    OPTIONS,
    add_sampling_arguments,
    check_option,
    parse_option,
    sampling_options,
)
from tritonmind_tools.console_screen import Screen
from tritonmind_tools.console_transport import Delta, Message, Source, Transport, finish_reason, is_too_long, statistics
from tritonmind_tools.conversation import Conversation, Turn

DEFAULT_SESSION = "1"


class _Command(NamedTuple):
    run: Callable[[str], None]
    usage: str
    help: str


class _Leave(Exception):
    """The user has had enough."""


class Console:
    """The conversation's state and its commands. What is shown, and where lines come from, is the screen's."""

    def __init__(
        self,
        transport: Transport,
        screen: Screen,
        *,
        system: str | None = None,
        options: Mapping[str, Any] | None = None,
        show_statistics: bool = True,
        session: str = DEFAULT_SESSION,
    ) -> None:
        self.sessions = {session: Conversation(system)}
        self.talk = self.sessions[session]
        self.options = dict(options or {})
        self._transport = transport
        self._screen = screen
        self._show_statistics = show_statistics
        self._failed = False
        self._commands = {
            "/help": _Command(self._help, "/help", "this list"),
            "/system": _Command(self._set_system, "/system TEXT", "begin with TEXT as the system message; empty: none"),
            "/set": _Command(self._set, "/set NAME VALUE", "a sampling option from now on; without VALUE: its default"),
            "/params": _Command(self._params, "/params", "the sampling options and their values"),
            "/history": _Command(self._history, "/history", "the conversation so far"),
            "/undo": _Command(self._undo, "/undo", "take the last question and its answer back"),
            "/retry": _Command(self._retry, "/retry", "ask the last question again, for another answer"),
            "/clear": _Command(self._clear, "/clear", "forget the conversation, as `end` does; options stay"),
            "/session": _Command(
                self._session, "/session NAME", "go to another conversation, a new one too; without NAME: list them"
            ),
            "/save": _Command(self._save, "/save FILE", "write the conversation to a new file, as JSON messages"),
        }

    def run(self) -> int:
        """Talk until the input ends. Returns 1 if something failed while nobody watched, in a pipe."""
        self._screen.greet(f"{self._transport.title}. An empty line sends, /help lists the commands, exit leaves.")
        try:
            while True:
                question = self._read()
                if question is not None:
                    self._ask(question)
        except _Leave:
            return 1 if self._failed and not self._screen.interactive else 0

    def _read(self) -> str | None:
        """The lines of a question; None when there was a command instead."""
        lines: list[str] = []
        while True:
            line = self._screen.read_line(first=not lines)
            if line is None:
                # Ctrl-C and Ctrl-D leave; the end of a pipe ends its last question.
                if lines and not self._screen.interactive:
                    return "\n".join(lines)
                raise _Leave
            if not lines and self._is_command(line):
                return None
            if line.strip():
                lines.append(line)
            elif lines:
                return "\n".join(lines)

    def _is_command(self, line: str) -> bool:
        """Obey `line` if it is a command."""
        word, _, rest = line.rstrip().partition(" ")
        if word == "exit" and not rest:
            raise _Leave
        if word == "end" and not rest:
            self._clear("")
            return True
        if not word.startswith("/"):
            return False
        try:
            if word not in self._commands:
                raise ConfigError(
                    f"unknown command {word}: /help lists them; a space before it sends the line as it is"
                )
            self._commands[word].run(rest.strip())
        except (TritonmindError, OSError) as error:
            self._fail(str(error))
        return True

    def _ask(self, question: str) -> None:
        """Have a question answered. One that fails, or is cancelled before a word came, is no part of the history."""
        self.talk.unanswered = question
        arrivals: list[tuple[float, Delta]] = []
        try:
            self._receive([*self.talk.messages, {"role": "user", "content": question}], arrivals)
        except TritonmindError as error:
            self._screen.end_answer()
            self._fail(f"{error}{self._remedy(error)}")
            return
        except KeyboardInterrupt:
            # The second Ctrl-C, or one before the answer was under way.
            if not self._screen.interactive:
                raise
        self._screen.end_answer()
        if self._show_statistics:
            self._screen.note(statistics(arrivals))
        answer = "".join(delta.text for _, delta in arrivals)
        if answer or finish_reason(arrivals) != "cancelled":
            self.talk.turns.append(Turn(question, answer))
            self.talk.unanswered = None

    def _receive(self, messages: list[Message], arrivals: list[tuple[float, Delta]]) -> None:
        """Show an answer as it comes, and add its parts to `arrivals`, each with the seconds after which it came."""
        begin = time.monotonic()
        with (
            contextlib.closing(self._transport.stream(messages, self.options)) as deltas,
            self._interrupts(self._transport.cancel),
        ):
            for delta in deltas:
                arrivals.append((time.monotonic() - begin, delta))
                self._screen.write(delta.text)

    @contextlib.contextmanager
    def _interrupts(self, cancel: Callable[[], None]) -> Iterator[None]:
        """In a terminal the first Ctrl-C calls `cancel`, from another thread: this one may hold any lock.

        A second one, should that not help, raises KeyboardInterrupt, as the first does in a pipe.
        """
        if not self._screen.interactive:
            yield
            return

        def on_interrupt(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, previous)
            threading.Thread(target=cancel, name="cancel", daemon=True).start()

        previous = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _remedy(self, error: TritonmindError) -> str:
        if not is_too_long(error):
            return ""
        if not self.talk.turns:
            return "; shorten the question"
        return "; the conversation before it counts: /undo takes the last turn back, /clear forgets all"

    def _fail(self, message: str) -> None:
        self._failed = True
        self._screen.error(message)

    def _help(self, rest: str) -> None:
        rows = [(command.usage, command.help) for command in self._commands.values()]
        rows += [
            ("end", "forget the conversation"),
            ("exit", "leave; so do Ctrl-D and Ctrl-C"),
            ("(empty line)", "send what was typed; Ctrl-C gives up the answer, what came of it stays"),
        ]
        self._screen.table(rows)

    def _set_system(self, rest: str) -> None:
        self.talk.system = rest or None
        self._screen.note(f"system: {rest}" if rest else "no system message")

    def _set(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        if not name:
            raise ConfigError("/set needs a name, as in: /set temperature 0.7")
        check_option(name)
        options = dict(self.options)
        if text.strip():
            options[name] = parse_option(name, text.strip())
        else:
            options.pop(name, None)
        SamplingParams(**options)
        self.options = options
        self._screen.note(f"{name} = {_shown(options.get(name))}")

    def _params(self, rest: str) -> None:
        self._screen.table([(name, _shown(self.options.get(name))) for name in OPTIONS])

    def _history(self, rest: str) -> None:
        if not self.talk.messages:
            self._screen.note("nothing was said yet")
        for message in self.talk.messages:
            self._screen.note(f"{message['role']}:")
            self._screen.write(message["content"])
            self._screen.end_answer()

    def _undo(self, rest: str) -> None:
        self._screen.note(f"taken back: {self._last_turn().question}")
        del self.talk.turns[-1]

    def _retry(self, rest: str) -> None:
        question = self.talk.unanswered
        if question is None:
            question = self._last_turn().question
            del self.talk.turns[-1]
        self._ask(question)

    def _last_turn(self) -> Turn:
        if not self.talk.turns:
            raise ConfigError("nothing was asked yet")
        return self.talk.turns[-1]

    def _clear(self, rest: str) -> None:
        self.talk.turns.clear()
        self.talk.unanswered = None
        self._screen.note("the conversation is forgotten")

    def _session(self, rest: str) -> None:
        if not rest:
            for name, talk in self.sessions.items():
                mark = "*" if talk is self.talk else " "
                self._screen.note(f"{mark} {name}: {len(talk.turns)} turns")
            return
        self.talk = self.sessions.setdefault(rest, Conversation(self.talk.system))
        self._screen.note(f"session {rest}: {len(self.talk.turns)} turns")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/save needs a file, as in: /save talk.json")
        path = Path(rest).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(self.talk.messages, file, ensure_ascii=False, indent=1)
                file.write("\n")
        except FileExistsError:
            raise ConfigError(f"{path} exists already: choose another name") from None
        self._screen.note(f"saved to {path}")


def _shown(value: Any) -> str:
    return "default" if value is None else json.dumps(value, ensure_ascii=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every console has."""
    parser.add_argument("--system", type=_text, metavar="TEXT", help="system message that begins the conversation")
    parser.add_argument(
        "--session-id", default=DEFAULT_SESSION, metavar="NAME", help="name of the first session (default: %(default)s)"
    )
    parser.add_argument("--no-stats", action="store_true", help="no line of statistics after an answer")
    add_sampling_arguments(parser)


def _text(text: str) -> str:
    """An argument; what was not UTF-8 in it, Python has put into surrogates, which no model can be sent."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8: set the terminal's encoding to it")
    return text


def converse(find: Callable[[], Source], args: argparse.Namespace, *, opening: str) -> int:
    """Run a console with the options of a command line on stdin and stdout. Returns the exit code.

    opening: shown while `find` works. Raises InvalidRequestError for a wrong option before that, and what it raises.
    """
    options = sampling_options(args)
    screen = Screen.standard()
    screen.greet(f"{opening} ...")
    with contextlib.closing(find()) as source, contextlib.closing(source.connect()) as transport:
        return Console(
            transport,
            screen,
            system=args.system,
            options=options,
            show_statistics=not args.no_stats,
            session=args.session_id,
        ).run()
