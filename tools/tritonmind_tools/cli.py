"""The console script `tritonmind`. Commands import what is heavy when they run, so that --help is immediate."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from tritonmind import __version__
from tritonmind.errors import TritonmindError
from tritonmind_tools import (
    api_client,
    api_server,
    bench,
    chat,
    check_env,
    convert,
    embedded_server,
    gradio_app,
    list_templates,
    lite,
    triton_client,
)

_RED, _RESET = "\x1b[31m", "\x1b[0m"
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    args = build_parser().parse_args(normalise(sys.argv[1:] if argv is None else argv))
    try:
        exit_code: int = args.run(args)
        return exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    # OSError: a full disk or a forbidden path is the user's to mend, and its message names the path.
    except (TritonmindError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        _print_error(str(error))
        return 1


class _Parser(argparse.ArgumentParser):
    """Sub-commands are of this class too, so that the one whose option it is not says so, not the first of them."""

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        namespace, unknown = super().parse_known_args(*args, **options)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return namespace, unknown

    def _unknown(self, argument: str) -> str:
        option = argument.partition("=")[0]
        similar = difflib.get_close_matches(option, self._option_string_actions, n=1)
        remedy = f"did you mean {similar[0]}? " if similar else ""
        return f"unknown argument {argument}: {remedy}`{self.prog} --help` lists them"


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tritonmind", description="LLM serving for NVIDIA Triton Inference Server: convert, chat, serve, check."
    )
    parser.add_argument("--version", action="version", version=f"tritonmind {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    convert.register(commands)
    chat.register(commands)
    serve = commands.add_parser("serve", help="start a server, or a client of one")
    serve_commands = serve.add_subparsers(title="commands", metavar="COMMAND", required=True)
    embedded_server.register(serve_commands)
    triton_client.register(serve_commands)
    api_server.register(serve_commands)
    api_client.register(serve_commands)
    gradio_app.register(serve_commands)
    lite.register(commands)
    list_templates.register(commands)
    check_env.register(commands)
    bench.register(commands)
    return parser


def normalise(argv: Sequence[str]) -> list[str]:
    """Spell option names with '-': --dst_path=X becomes --dst-path=X. Values and what follows '--' stay as they are."""
    normalised: list[str] = []
    for position, argument in enumerate(argv):
        if argument == "--":
            return [*normalised, *argv[position:]]
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = name.replace("_", "-") + equals + value
        normalised.append(argument)
    return normalised


def _print_error(message: str) -> None:
    text = "tritonmind: error: " + "\n".join(line.rstrip() for line in message.splitlines() if line.strip())
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        text = f"{_RED}{text}{_RESET}"
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
