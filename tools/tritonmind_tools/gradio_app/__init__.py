"""`tritonmind serve gradio`: a chat in the browser, with an engine of its own, an API server or a Triton server."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tritonmind.errors import ConfigError
from tritonmind_tools import api_client, chat, triton_client
from tritonmind_tools.ports import ensure_port_free, free_port

if TYPE_CHECKING:
    from tritonmind_tools.console_transport import Source

DEFAULT_PORT = 6006
DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_NUM_ANSWERS = 32
# What only an engine of this process can be told.
_ENGINE_OPTIONS = ("chat_template", "session_len", "dtype", "device", "tp")

_EXAMPLES = """examples:
  tritonmind serve gradio ./workspace                                       an engine of its own
  tritonmind serve gradio http://localhost:23333                            tritonmind serve api_server, or another
  tritonmind serve gradio localhost:33337                                   a Triton server's gRPC port
  tritonmind serve gradio ./workspace --server_name 0.0.0.0                 for other machines too
"""


def open_source(args: argparse.Namespace) -> Source:
    """What a command line names: http://..., HOST:PORT or a path; a file or folder of that name goes first.

    Raises TritonmindError if nothing answers there, or no engine starts.
    """
    name: str = args.source
    if args.restful_api and "://" not in name:
        name = f"http://{name}"
    if "://" in name:
        _refuse(args, _ENGINE_OPTIONS, f"the API server at {name}")
        source: Source = api_client.ApiServer(name, api_key=api_client.api_key(args), model=args.model_name)
    elif re.fullmatch(r"[^/\\]+:\d+", name) and not os.path.exists(name):
        _refuse(args, (*_ENGINE_OPTIONS, "model_name", "api_key"), f"the Triton server at {name}")
        source = triton_client.TritonServer(name)
    else:
        _refuse(args, ("api_key",), f"an engine of its own on {name}")
        overrides = {name: getattr(args, name) for name in chat.OVERRIDES if getattr(args, name) is not None}
        if args.tp is not None:
            overrides["tensor_parallel_size"] = args.tp
        return chat.LocalEngine(name, {"max_num_seqs": args.batch_size, **overrides})
    source.connect().close()
    return source


def _refuse(args: argparse.Namespace, names: Sequence[str], source: str) -> None:
    """Raise ConfigError for an option that a source of that kind has no use for."""
    for name in names:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} means nothing to {source}: leave it out")


def register(subparsers: Any) -> None:
    """Add `gradio` to the subparsers of `tritonmind serve`."""
    parser = subparsers.add_parser(
        "gradio",
        help="chat with a model in the browser",
        description="Chat in the browser with a model on this machine or of a server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="PATH|URL|HOST:PORT", help="workspace or checkpoint, URL of an API server, or a Triton server"
    )
    parser.add_argument("--server-name", default=DEFAULT_ADDRESS, metavar="ADDR", help="default %(default)s")
    parser.add_argument(
        "--server-port", type=int, default=DEFAULT_PORT, metavar="PORT", help="default %(default)s, 0 for a free one"
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=DEFAULT_NUM_ANSWERS,
        metavar="N",
        help="answers that may run at once, over all browsers (default %(default)s)",
    )
    parser.add_argument("--share", action="store_true", help="also open a public address, through Gradio's servers")
    parser.add_argument(
        "--restful-api",
        type=_truth,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="what is named is an API server, also without http://",
    )
    parser.add_argument("--tp", type=_positive, metavar="N", help="ranks of an engine of its own: 1 in this version")
    chat.add_engine_arguments(parser)  # of an API server, --model-name is the model to ask
    api_client.add_server_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Raises TritonmindError when Gradio, the model or the port cannot be had."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("Gradio is not installed: pip install 'tritonmind[gradio]'")
    ensure_port_free(args.server_name, args.server_port, "--server_port")
    port = args.server_port or free_port(args.server_name)
    print(f"Opening {args.source} ...", flush=True)
    with contextlib.closing(open_source(args)) as source:
        from tritonmind_tools.gradio_app.serve import serve

        with contextlib.suppress(KeyboardInterrupt):
            serve(source, host=args.server_name, port=port, num_answers=args.batch_size, share=args.share)
    print("Stopped", flush=True)
    return 0


def _truth(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)
