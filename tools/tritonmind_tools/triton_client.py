"""`tritonmind serve triton_client`: chat with a served model in a terminal or a pipe. Needs only tritonclient."""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from tritonmind.errors import ConfigError, TritonmindError, UnavailableError

MODEL_NAME = "tritonmind"
CONNECT_TIMEOUT_S = 5.0
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


class AnswerError(TritonmindError):
    """The server answered with an error. `status` is the gRPC status, such as INVALID_ARGUMENT, if it was asked for."""

    def __init__(self, message: str, status: str | None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one response added to an answer. finish_reason is set on the last: stop, length or cancelled."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | None = None


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port". Raises ConfigError that says what is wrong with it."""
    if "://" in address:
        scheme, _, rest = address.partition("://")
        raise ConfigError(
            f"address {address!r}: leave out {scheme}://, the client speaks gRPC to the server's gRPC port, e.g. {rest}"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"address {address!r} must be host:port, e.g. 127.0.0.1:33337")
    return host.strip("[]"), int(port)


class TritonClient:
    """One connection to a served model, one answer at a time.

    Raises ConfigError for a malformed address, UnavailableError naming the address when nothing answers there or the
    model is not ready. error_status: have the server turn the error of an answer into a gRPC status. Left off because
    tritonserver 2.51 crashes, about every other time, when an answer that has begun ends like that.
    """

    def __init__(self, address: str, *, model: str = MODEL_NAME, error_status: bool = False) -> None:
        from tritonclient import grpc
        from tritonclient.utils import InferenceServerException

        host, port = parse_address(address)
        try:
            # gRPC itself would back off and retry for seconds before it says the same less clearly.
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise UnavailableError(
                f"no server answers at {address} ({error}): is it started, is this its gRPC port?"
            ) from None
        self.address = address
        self._model = model
        self._headers = {"triton_grpc_error": "true"} if error_status else None
        self._client = grpc.InferenceServerClient(address)
        self._cancelled = threading.Event()
        self._events: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        try:
            ready = self._client.is_model_ready(model, client_timeout=CONNECT_TIMEOUT_S)
        except InferenceServerException as error:
            self.close()
            raise UnavailableError(f"what answers at {address} is no Triton server's gRPC port: {error}") from None
        if not ready:
            self.close()
            raise UnavailableError(f"the server at {address} has no model {model!r} that is ready")

    def __enter__(self) -> TritonClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def generate(
        self,
        *,
        text: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        input_ids: Sequence[int] | None = None,
        stream: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> Generator[Delta, None, None]:
        """Yield the answer to one of a text, chat messages or token ids; the last Delta has the finish_reason.

        options: keys of sampling_parameters. Leaving the iteration early cancels the answer. Raises AnswerError.
        """
        from tritonclient.utils import InferenceServerException

        inputs = _inputs(text, messages, input_ids, stream, options or {})
        self._cancelled.clear()
        events = self._events = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: events.put((result, error)), headers=self._headers)
        finished = False
        try:
            # When the stream is broken already, its error is among the events.
            with contextlib.suppress(InferenceServerException):
                self._client.async_stream_infer(self._model, inputs, enable_empty_final_response=True)
            while not finished:
                result, error = events.get()
                if self._cancelled.is_set():
                    finished = True
                    yield Delta(finish_reason="cancelled")
                elif error is not None:
                    finished = True
                    status = error.status()
                    raise AnswerError(
                        error.message() or "the server gave no reason",
                        status and str(status).removeprefix("StatusCode."),
                    )
                else:
                    finished = result.get_response().parameters["triton_final_response"].bool_param
                    yield _delta(result)
        finally:
            self._client.stop_stream(cancel_requests=not finished or self._cancelled.is_set())

    def cancel(self) -> None:
        """Give up the running answer, from any thread: its last Delta then says "cancelled"."""
        self._cancelled.set()
        self._events.put((None, None))


def _inputs(
    text: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    input_ids: Sequence[int] | None,
    stream: bool,
    options: Mapping[str, Any],
) -> list[Any]:
    import numpy as np
    from tritonclient import grpc
    from tritonclient.utils import np_to_triton_dtype

    arrays: dict[str, np.ndarray] = {"stream": np.array([stream])}
    if text is not None:
        arrays["text_input"] = np.array([text.encode()], dtype=np.object_)
    if messages is not None:
        arrays["messages"] = np.array([json.dumps(list(messages)).encode()], dtype=np.object_)
    if input_ids is not None:
        arrays["input_ids"] = np.array(input_ids, dtype=np.int32)
    if options:
        arrays["sampling_parameters"] = np.array([json.dumps(dict(options)).encode()], dtype=np.object_)
    inputs = []
    for name, array in arrays.items():
        tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def _delta(result: Any) -> Delta:
    def texts(name: str) -> str:
        return b"".join(result.as_numpy(name).reshape(-1).tolist()).decode()

    def numbers(name: str) -> list[int]:
        return result.as_numpy(name).reshape(-1).tolist()

    return Delta(
        text=texts("text_output"),
        token_ids=numbers("token_ids"),
        num_tokens=sum(numbers("num_output_tokens")),
        num_input_tokens=sum(numbers("num_input_tokens")),
        num_cached_tokens=sum(numbers("num_cached_tokens")),
        finish_reason=texts("finish_reason") or None,
        stop_reason=texts("stop_reason") or None,
    )


class Chat:
    """A conversation in a terminal. The history lives here; the server sees all of it with each turn.

    Ctrl-C during an answer cancels it, what was said so far stays; elsewhere it ends the conversation.
    """

    def __init__(
        self, client: TritonClient, *, system: str | None, stream: bool, options: Mapping[str, Any], interactive: bool
    ) -> None:
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._client = client
        self._stream = stream
        self._options = options
        self._interactive = interactive

    def run(self, lines: TextIO) -> int:
        """Answer line after line until `exit` or the end of input. Returns 1 if an answer failed in a pipe."""
        exit_code = 0
        while True:
            if self._interactive:
                _write("> ")
            line = lines.readline()
            if not line or line.strip() == "exit":
                return exit_code
            if not line.strip():
                continue
            self.messages.append({"role": "user", "content": line.rstrip("\n")})
            try:
                self.messages.append({"role": "assistant", "content": self._answer()})
            except AnswerError as error:
                self.messages.pop()
                print(f"error: {error}", file=sys.stderr)
                exit_code = 0 if self._interactive else 1

    def _answer(self) -> str:
        begin = time.monotonic()
        first = last = begin
        parts: list[str] = []
        num_tokens, finish_reason = 0, "cancelled"
        try:
            for delta in self._client.generate(messages=self.messages, stream=self._stream, options=self._options):
                last = time.monotonic()
                first = first if parts else last
                parts.append(delta.text)
                num_tokens += delta.num_tokens
                finish_reason = delta.finish_reason or finish_reason
                _write(delta.text)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
        _write("\n")
        rate = f"{num_tokens / (last - begin):.1f} tok/s, " if last > begin else ""
        statistics = f"[{num_tokens} tokens, {rate}first after {first - begin:.2f} s, {finish_reason}]"
        if self._interactive:
            _write(f"{_DIM}{statistics}{_RESET}\n")
        else:
            print(statistics, file=sys.stderr)
        return "".join(parts)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def register(subparsers: Any) -> None:
    """Add `triton_client` to the subparsers of `tritonmind serve`."""
    parser = subparsers.add_parser(
        "triton_client",
        help="chat with a served model in the terminal",
        description="A line in, the answer out. Ctrl-C cancels an answer; `exit`, Ctrl-D or Ctrl-C at the prompt ends. "
        "When stdout is not a terminal the answers are plain text and the statistics go to stderr.",
    )
    parser.add_argument("address", metavar="ADDR", help="host:port of the server's gRPC service, without a scheme")
    parser.add_argument("--system", metavar="TEXT", help="system message that begins the conversation")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens an answer may have")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--top-p", type=float, metavar="P", help="above 0 and at most 1")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 keeps all tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=True, help="show the answer as it comes"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends. Raises TritonmindError when the server cannot be reached."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with TritonClient(args.address) as client:
        chat = Chat(client, system=args.system, stream=args.stream, options=options, interactive=interactive)
        try:
            return chat.run(sys.stdin)
        except KeyboardInterrupt:
            _write("\n")
            return 0 if interactive else 130
