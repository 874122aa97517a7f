"""`tritonmind list`: the chat templates that have a name."""

from __future__ import annotations

import argparse
from typing import Any

_EXAMPLE = (
    {"role": "user", "content": "QUESTION 1"},
    {"role": "assistant", "content": "ANSWER 1"},
    {"role": "user", "content": "QUESTION 2"},
)


def register(subparsers: Any) -> None:
    """Add the command `list`."""
    parser = subparsers.add_parser(
        "list",
        help="print the chat templates that have a name",
        description="Print the chat templates that have a name, for checkpoints that bring none: `convert NAME PATH`, "
        "`chat PATH --model-name NAME`. With --chat-template NAME one is used instead of the checkpoint's own.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="print a conversation as this template writes it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command line's `list`. Raises ConfigError for an unknown name."""
    from tritonmind.named_templates import NAMED_TEMPLATES

    if args.name is not None:
        print(_example(args.name))
        return 0
    width = max(map(len, NAMED_TEMPLATES))
    print("Chat templates by name; a checkpoint's own comes before them (docs/templates.md):")
    for name, named in NAMED_TEMPLATES.items():
        print(f"  {name:{width}}  {named.purpose}")
    return 0


def _example(name: str) -> str:
    from tritonmind.chat_template import ChatTemplate
    from tritonmind.errors import ConfigError
    from tritonmind.named_templates import NAMED_TEMPLATES, named_template

    template = named_template(name)
    if template is None:
        raise ConfigError(f"{name!r} is not a chat template's name; there are {', '.join(NAMED_TEMPLATES)}")
    if template.capability == "completion":
        return "(no form for conversations: the model continues texts)"
    return ChatTemplate(template.jinja_source(adds_bos=False), {}, where=name).render(_EXAMPLE)
