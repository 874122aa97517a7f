"""`tritonmind serve triton_client`: a served model in the console. Needs only tritonclient."""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import socket
import threading
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any

from tritonmind.errors import ConfigError, TritonmindError, UnavailableError
from tritonmind_tools import console
from tritonmind_tools.console_transport import Delta, Message, Status, require

MODEL_NAME = "tritonmind"
CONNECT_TIMEOUT_S = 5.0


class AnswerError(TritonmindError):
    """The server answered with an error. `status` is the gRPC status, such as INVALID_ARGUMENT, if it was asked for."""

    def __init__(self, message: str, status: str | None) -> None:
        super().__init__(message)
        self.status = status


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
    model is not ready. Errors of answers come inside the stream: tritonserver 2.51 may crash where a client has it turn
    them into gRPC statuses (header triton_grpc_error).
    """

    def __init__(self, address: str, *, model: str = MODEL_NAME) -> None:
        require("tritonclient", "grpc")
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
        self._client.start_stream(lambda result, error: events.put((result, error)))
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


class TritonServer:
    """A Triton server as the source of conversations. Raises ConfigError for a malformed address."""

    def __init__(self, address: str, *, stream: bool = True) -> None:
        parse_address(address)
        self._address = address
        self._stream = stream

    def connect(self) -> TritonTransport:
        return TritonTransport(self._address, stream=self._stream)

    def status(self) -> Status:
        try:
            with TritonClient(self._address):
                return Status(is_ready=True, text=f"{MODEL_NAME}, Triton server {self._address}")
        except TritonmindError as error:
            return Status(is_ready=False, text=str(error))

    def close(self) -> None:
        """Conversations have connections of their own."""


class TritonTransport:
    """A console's way to a served model. A connection that is lost is made anew by the next answer."""

    def __init__(self, address: str, *, stream: bool = True) -> None:
        self.title = f"the server at {address}"
        self._address = address
        self._stream = stream
        self._client: TritonClient | None = TritonClient(address)

    def stream(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Generator[Delta, None, None]:
        client = self._client = self._client or TritonClient(self._address)
        try:
            yield from client.generate(messages=messages, stream=self._stream, options=options)
        except AnswerError as error:
            # The server's refusals carry no status; what gRPC says of a broken connection does.
            if error.status is None:
                raise
            self.close()
            raise UnavailableError(
                f"the connection to {self._address} is lost ({error}): the next question connects again"
            ) from None

    def cancel(self) -> None:
        client = self._client
        if client is not None:
            client.cancel()

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()


_EXAMPLES = """examples:
  tritonmind serve triton_client 127.0.0.1:33337                        talk; an empty line sends, /help says more
  tritonmind serve triton_client 127.0.0.1:33337 --system 'Be brief.'   with a system message
  echo 'Name three rivers.' | tritonmind serve triton_client 127.0.0.1:33337 --temperature 0 > answer.txt

In a pipe each paragraph is a question, answers go to stdout and statistics to stderr.
"""


def register(subparsers: Any) -> None:
    """Add `triton_client` to the subparsers of `tritonmind serve`."""
    parser = subparsers.add_parser(
        "triton_client",
        help="chat with a served model in the terminal",
        description="Chat with a model that a Triton server serves.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("address", metavar="ADDR", help="host:port of the server's gRPC service, without a scheme")
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=True, help="show the answer as it comes"
    )
    console.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends. Raises TritonmindError when the server cannot be reached or an option is wrong."""
    source = partial(TritonServer, args.address, stream=args.stream)
    return console.converse(source, args, opening=f"connecting to {args.address}")
