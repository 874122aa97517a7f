"""`tritonmind serve api_server`: OpenAI's API over a model on this machine or in a Triton server."""

from __future__ import annotations

import argparse
from typing import Any

from tritonmind_tools.api_server.dialect import AUTO, REASONING_PARSERS, TOOL_PARSERS
from tritonmind_tools.chat import add_checkpoint_arguments

DEFAULT_PORT = 23333  # LMDeploy's
DEFAULT_ADDRESS = "127.0.0.1"

_EXAMPLES = """examples:
  tritonmind serve api_server ./workspace                                 on http://127.0.0.1:23333, Swagger UI at /
  tritonmind serve api_server ./workspace --server-name 0.0.0.0 --api-key SECRET
  tritonmind serve api_server 127.0.0.1:33337                             over a running Triton server's gRPC port
  curl http://127.0.0.1:23333/v1/models

API keys may also stand in TRITONMIND_API_KEYS, separated by commas: there no other user of the machine sees them.
"""


def register(subparsers: Any) -> None:
    """Add `api_server` to the subparsers of `tritonmind serve`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "api_server",
        help="serve OpenAI's API",
        description="Serve OpenAI's HTTP API over a workspace, a checkpoint or a Triton server. Ctrl-C stops it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", metavar="PATH|HOST:PORT", help="workspace, checkpoint, or a Triton server's gRPC port"
    )
    parser.add_argument("--server-name", default=DEFAULT_ADDRESS, metavar="ADDR", help="default %(default)s")
    parser.add_argument(
        "--server-port", type=int, default=DEFAULT_PORT, metavar="PORT", help="default %(default)s, 0 for a free one"
    )
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: its own name)")
    _add_engine(parser.add_argument_group("engine", "of a PATH; a Triton server's engine has settings of its own"))
    _add_text(parser.add_argument_group("text"))
    _add_access(parser.add_argument_group("access and limits"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises TritonmindError for a wrong option or a model that cannot be served."""
    # Here, because it loads the web framework.
    from tritonmind_tools.api_server.server import serve

    return serve(args)


def _add_engine(group: Any) -> None:
    group.add_argument(
        "--instance-num", type=int, metavar="N", help="requests that run at once (default: config.ini's)"
    )
    group.add_argument("--tp", type=int, metavar="N", help="ranks: 1 in this version, as the weights are split")
    group.add_argument("--session-len", type=int, metavar="N", help="tokens of prompt and answer together")
    group.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), help="type to compute in")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute")
    group.add_argument("--cache-max-entry-count", type=float, metavar="X", help="the KV cache's share of free memory")
    add_checkpoint_arguments(group)
    group.add_argument(
        "--engine-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="over config.ini's"
    )


def _add_text(group: Any) -> None:
    group.add_argument(
        "--tool-call-parser",
        choices=TOOL_PARSERS,
        default=AUTO,
        help="how the model writes calls of tools (default: by its chat template); prompt describes tools to any model",
    )
    group.add_argument(
        "--reasoning-parser",
        choices=REASONING_PARSERS,
        default=AUTO,
        help="think: what is between <think> and </think> goes to reasoning_content (default: by the chat template)",
    )


def _add_access(group: Any) -> None:
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help="clients must send it; may repeat")
    group.add_argument(
        "--max-concurrent-requests", type=int, default=0, metavar="N", help="more get a 429 (default: no limit)"
    )
    group.add_argument(
        "--max-body-size", type=float, default=32, metavar="MIB", help="of a request, default %(default)s"
    )
    group.add_argument(
        "--client-timeout", type=float, default=60, metavar="S", help="a client that reads nothing so long is dropped"
    )
    group.add_argument("--allow-origins", nargs="+", default=[], metavar="ORIGIN", help="pages that may call (CORS)")
    group.add_argument("--allow-credentials", action="store_true", help="of CORS")
    group.add_argument("--allow-methods", nargs="+", default=["*"], metavar="METHOD", help="of CORS, default all")
    group.add_argument("--allow-headers", nargs="+", default=["*"], metavar="HEADER", help="of CORS, default all")
    group.add_argument("--ssl-certfile", metavar="FILE", help="serve https with this certificate")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its private key, if that is in another file")
