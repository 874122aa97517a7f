"""Runs the application: the model, the socket, uvicorn."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import socket
import ssl
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.errors import ConfigError, TritonmindError
from tritonmind.random_model import PREFIX
from tritonmind_tools.bench.options import key_values
from tritonmind_tools.ports import check_port, ensure_port_free

try:
    import uvicorn

    if find_spec("fastapi_offline") is None:
        raise ImportError("no fastapi-offline")
    from tritonmind_tools.api_server.app import Settings, create_app
except ImportError as error:
    raise TritonmindError(
        f"the API server's packages are not installed ({error}): pip install 'tritonmind[api]'"
    ) from None

if TYPE_CHECKING:
    from tritonmind_tools.api_server.backends import Backend

KEYS_VARIABLE = "TRITONMIND_API_KEYS"
SHUTDOWN_TIMEOUT_S = 5
KEEP_ALIVE_S = 30
BACKLOG = 2048
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):\d+")
_ENGINE_OPTIONS = {
    "instance_num": "max_num_seqs",
    "tp": "tensor_parallel_size",
    "session_len": "max_model_len",
    "dtype": "dtype",
    "device": "device",
    "cache_max_entry_count": "cache_max_entry_count",
    "allow_pickle": "allow_pickle",
}


def serve(args: argparse.Namespace) -> int:
    """See `api_server.run`."""
    settings = _settings(args)
    tls = _tls(args)
    listener = listen(args.server_name, args.server_port, args.client_timeout)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    backend = open_backend(args)
    try:
        port = listener.getsockname()[1]
        host = f"[{args.server_name}]" if ":" in args.server_name else args.server_name
        scheme = "https" if tls else "http"
        print(f"{backend.model.name} at {scheme}://{host}:{port}/v1, routes at {scheme}://{host}:{port}", flush=True)
        if not settings.api_keys and args.server_name not in ("127.0.0.1", "localhost", "::1"):
            print("Whoever reaches this port may use it: --api-key asks for a key", flush=True)
        config = uvicorn.Config(
            create_app(backend, settings),
            log_level="warning",
            access_log=False,
            ws="none",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
            **tls,
        )
        server = uvicorn.Server(config)
        # uvicorn raises the signal that stopped it again when all connections have ended; the engine is closed then.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        server.run(sockets=[listener])
        if not server.started:
            raise TritonmindError("the server did not start: its log above says why")
    finally:
        listener.close()
        backend.close()
    print("Stopped", flush=True)
    return 0


def open_backend(args: argparse.Namespace) -> Backend:
    """The model that the options name. Raises TritonmindError."""
    given = {name: getattr(args, name) for name in _ENGINE_OPTIONS if getattr(args, name) is not None}
    if _is_address(args.target):
        if given or args.engine_options or args.chat_template:
            name = next(iter(given), "engine_options" if args.engine_options else "chat_template").replace("_", "-")
            raise ConfigError(
                f"--{name} is for a PATH: the engine of the Triton server at {args.target} has its settings"
            )
        from tritonmind_tools.api_server.triton_backend import TritonBackend

        return TritonBackend(args.target, name=args.model_name)
    from tritonmind_tools.api_server.local_backend import LocalBackend

    overrides: dict[str, object] = dict(key_values(args.engine_options))
    for name, value in given.items():
        if overrides.setdefault(_ENGINE_OPTIONS[name], value) != value:
            raise ConfigError(
                f"--engine-options: {_ENGINE_OPTIONS[name]} is given twice, by --{name.replace('_', '-')} too"
            )
    print(f"loading {args.target}", flush=True)
    backend = LocalBackend(args.target, overrides, name=args.model_name, chat_template=args.chat_template)
    for warning in backend.warnings:
        print(f"warning: {warning}", flush=True)
    print(backend.info.memory_plan, flush=True)
    return backend


def _is_address(target: str) -> bool:
    """Whether it is HOST:PORT, not a path of that name."""
    return not target.startswith(PREFIX) and not Path(target).exists() and bool(_ADDRESS.fullmatch(target))


def _settings(args: argparse.Namespace) -> Settings:
    if not all(key.strip() for key in args.api_key):
        raise ConfigError("--api-key is empty: give a key, or leave the option out to ask for none")
    keys = [*args.api_key, *os.environ.get(KEYS_VARIABLE, "").split(",")]
    keys = [key.strip() for key in keys if key.strip()]
    if not 0 < args.max_body_size <= 1 << 20:
        raise ConfigError(f"--max-body-size={args.max_body_size:g} must be mebibytes, more than 0")
    if args.max_concurrent_requests < 0:
        raise ConfigError(f"--max-concurrent-requests={args.max_concurrent_requests} must be 0 (no limit) or more")
    if not 0.1 <= args.client_timeout <= 86400:
        raise ConfigError(f"--client-timeout={args.client_timeout:g} must be 0.1 to 86400 seconds")
    if args.allow_credentials and "*" in args.allow_origins:
        raise ConfigError("--allow-credentials lets pages send cookies: name the --allow-origins, not *")
    return Settings(
        api_keys=tuple(keys),
        max_body_bytes=int(args.max_body_size * (1 << 20)),
        max_requests=args.max_concurrent_requests,
        allow_origins=tuple(args.allow_origins),
        allow_credentials=args.allow_credentials,
        allow_methods=tuple(args.allow_methods),
        allow_headers=tuple(args.allow_headers),
        tool_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
    )


def _tls(args: argparse.Namespace) -> dict[str, Any]:
    """uvicorn's options for https, {} for http. ConfigError for files that are no certificate and key."""
    if not args.ssl_certfile:
        if args.ssl_keyfile:
            raise ConfigError("--ssl-keyfile goes with --ssl-certfile")
        return {}
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(args.ssl_certfile, args.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--ssl-certfile={args.ssl_certfile}, --ssl-keyfile={args.ssl_keyfile}: {error}") from None
    return {"ssl_certfile": args.ssl_certfile, "ssl_keyfile": args.ssl_keyfile}


def listen(address: str, port: int, client_timeout: float) -> socket.socket:
    """A listening socket, whose connections end when their client takes nothing for `client_timeout` seconds.

    Raises TritonmindError naming the option that is wrong.
    """
    check_port(port, "--server-port")
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--server-name={address}: {error}") from None
    family, _, _, _, where = found[0]
    ensure_port_free(str(where[0]), port, "--server-port")
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by each connection: the kernel ends it when data has waited for its client for so long.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(client_timeout * 1000))
    listener.bind(where)
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener
