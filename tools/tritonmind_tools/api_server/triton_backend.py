"""A model in a Triton server, over one gRPC channel: a stream for each request, which is cancelled with it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
import numpy as np

from tritonmind.errors import (
    BusyError,
    CancelledError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    TritonmindError,
    UnavailableError,
)
from tritonmind.request_fields import ParsedRequest
from tritonmind.sampling_params import SamplingParams
from tritonmind_tools.api_server.backends import ServedModel, merged
from tritonmind_tools.api_server.structured import response_format
from tritonmind_tools.console_transport import Delta
from tritonmind_tools.triton_client import MODEL_NAME, parse_address

CONNECT_TIMEOUT_S = 10.0
_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),  # else a server that comes back is noticed up to two minutes later
)
_OUTPUTS = (
    "text_output",
    "token_ids",
    "finish_reason",
    "stop_reason",
    "num_input_tokens",
    "num_output_tokens",
    "num_cached_tokens",
)
_DTYPES: dict[str, Any] = {"INT32": np.int32, "UINT32": np.uint32, "FP32": np.float32}
_NEUTRAL = msgspec.to_builtins(SamplingParams())


class TritonBackend:
    """The model `tritonmind` of the Triton server at HOST:PORT. Its tokenizer and chat template stay there.

    name: what the model is called here. Raises ConfigError for a malformed address, UnavailableError where nothing
    answers.
    """

    def __init__(self, address: str, *, name: str | None = None) -> None:
        host_and_port = parse_address(address)
        try:
            socket.create_connection(host_and_port, timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise UnavailableError(f"no server answers at {address} ({error}): is it started?") from None
        try:
            from grpc import aio
            from tritonclient.grpc import service_pb2
        except ImportError as error:
            raise TritonmindError(
                f"tritonclient is not installed ({error}): pip install 'tritonmind[client]'"
            ) from None
        self._aio = aio
        self._messages = service_pb2
        self._address = address
        self.model = ServedModel(name=name or MODEL_NAME, created=int(time.time()))

    async def connect(self) -> None:
        self._channel = self._aio.insecure_channel(self._address, options=_OPTIONS)
        self._call = self._channel.stream_stream(
            _STREAM, response_deserializer=self._messages.ModelStreamInferResponse.FromString
        )
        if not await self.is_ready(CONNECT_TIMEOUT_S):
            await self._channel.close()
            raise UnavailableError(
                f"no model {MODEL_NAME!r} is ready at {self._address}: is the server started, is this its gRPC port?"
            )

    async def answer(self, request: ParsedRequest) -> AsyncGenerator[list[Delta], None]:
        from grpc import RpcError

        content = self._message(request)
        call = self._call()
        pending: list[list[Delta]] = []
        arrived = asyncio.Event()
        error: TritonmindError | None = None
        ended = False

        async def read() -> None:
            nonlocal error, ended
            try:
                await call.write(content)
                async for message in call:
                    if message.error_message:
                        error = told_error(message.error_message)
                        break
                    pending.append(_deltas(message.infer_response))
                    arrived.set()
                    if message.infer_response.parameters["triton_final_response"].bool_param:
                        await call.done_writing()
                        break
            except RpcError as failure:
                error = UnavailableError(f"the Triton server at {self._address} cannot be reached: {failure.details()}")
            ended = True
            arrived.set()

        reader = asyncio.ensure_future(read())
        finished: set[int] = set()
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                is_last = ended
                if pending:
                    batch = merged(pending)
                    pending = []
                    batch = [
                        delta
                        for delta in batch
                        if delta.index not in finished and (delta.num_tokens or delta.text or delta.finish_reason)
                    ]
                    finished.update([delta.index for delta in batch if delta.finish_reason])
                    if batch:
                        yield batch
                if is_last and not pending:
                    if error is not None:
                        raise error
                    return
        finally:
            reader.cancel()
            call.cancel()

    async def is_ready(self, timeout: float = 2.0) -> bool:
        from grpc import RpcError

        ask = self._channel.unary_unary(
            "/inference.GRPCInferenceService/ModelReady",
            request_serializer=self._messages.ModelReadyRequest.SerializeToString,
            response_deserializer=self._messages.ModelReadyResponse.FromString,
        )
        try:
            return bool((await ask(self._messages.ModelReadyRequest(name=MODEL_NAME), timeout=timeout)).ready)
        except RpcError:
            return False

    def metrics(self) -> str:
        return f"# The model's metrics are at the metrics port of the Triton server at {self._address}\n"

    def close(self) -> None:
        return  # the channel ends with its loop

    def _message(self, request: ParsedRequest) -> bytes:
        """The request as the server takes it."""
        message = self._messages.ModelInferRequest(model_name=MODEL_NAME)
        message.parameters["triton_enable_empty_final_response"].bool_param = True

        def add(name: str, kind: str, raw: bytes, length: int = 1) -> None:
            tensor = message.inputs.add(name=name, datatype=kind)
            tensor.shape.append(length)
            message.raw_input_contents.append(raw)

        def add_text(name: str, text: str) -> None:
            encoded = text.encode()
            add(name, "BYTES", len(encoded).to_bytes(4, "little") + encoded)

        def add_flag(name: str, value: bool) -> None:
            add(name, "BOOL", bytes([value]))

        if request.text is not None:
            add_text("text_input", request.text)
        if request.input_ids is not None:
            for token_id in request.input_ids:
                if not 0 <= token_id < 2**31:
                    raise InvalidRequestError("input_ids", token_id, "token ids are 0 to 2147483647")
            add("input_ids", "INT32", np.array(request.input_ids, np.int32).tobytes(), len(request.input_ids))
        if request.messages is not None:
            add_text("messages", json.dumps(request.messages))
        if request.tools is not None:
            add_text("tools", json.dumps(request.tools))
        if request.template_variables is not None:
            add_text("chat_template_kwargs", json.dumps(request.template_variables))
        session = request.session
        if session is not None:
            add("session_id", "UINT64", session.session_id.to_bytes(8, "little"))
            for name, value in (
                ("sequence_start", session.start),
                ("sequence_end", session.end),
                ("session_stop", session.stop),
            ):
                if value:
                    add_flag(name, True)
        add_flag("stream", request.stream)
        add_text("sampling_parameters", json.dumps(_options(request.params)))
        for name in (*_OUTPUTS, *request.outputs):
            message.outputs.add(name=name)
        return bytes(message.SerializeToString())


def _options(params: SamplingParams) -> dict[str, Any]:
    """What differs from an option left out. Ids of logit_bias are texts in JSON."""
    options = {name: value for name, value in msgspec.to_builtins(params).items() if value != _NEUTRAL[name]}
    if params.guided is not None:
        del options["guided"]
        options["response_format"] = response_format(params.guided)
    return options


def _deltas(response: Any) -> list[Delta]:
    """A response's n answers."""
    values: dict[str, list[Any]] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.datatype == "BYTES":
            values[tensor.name] = _texts(raw)
        else:
            values[tensor.name] = np.frombuffer(raw, _DTYPES[tensor.datatype]).tolist()
    if "text_output" not in values:
        return []
    ids = iter(values["token_ids"])
    prompt_logprobs = json.loads(values["prompt_logprobs"][0]) if "prompt_logprobs" in values else None
    deltas = []
    for index, text in enumerate(values["text_output"]):
        num_tokens = values["num_output_tokens"][index]
        logprobs = json.loads(values["logprobs"][index]) if "logprobs" in values else None
        deltas.append(
            Delta(
                index=index,
                text=text,
                token_ids=[next(ids) for _ in range(num_tokens)],
                num_tokens=num_tokens,
                num_input_tokens=values["num_input_tokens"][0],
                num_cached_tokens=values["num_cached_tokens"][0],
                finish_reason=values["finish_reason"][index] or None,
                stop_reason=values["stop_reason"][index] or None,
                logprobs=logprobs or [],
                prompt_logprobs=prompt_logprobs,
            )
        )
    return deltas


def _texts(raw: bytes) -> list[str]:
    texts, at = [], 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 4], "little")
        texts.append(raw[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return texts


class _Told(InvalidRequestError):
    """An error whose text came from the server."""

    def __init__(self, message: str, field: str) -> None:
        TritonmindError.__init__(self, message)
        self.field = field


def _deadline(message: str) -> TritonmindError:
    error = DeadlineError(0)
    error.args = (message,)
    return error


# Errors come as texts within a stream, without their codes: what tells their kinds apart is how they begin or what
# they say. They are written in tritonmind.errors, sessions, serving and senders.
_KINDS: tuple[tuple[re.Pattern[str], Callable[[str], TritonmindError]], ...] = (
    (re.compile(r"session expired|no live request "), NotFoundError),
    (re.compile(r"session \d+ is busy "), BusyError),
    (re.compile(r"deadline exceeded "), _deadline),
    (re.compile(r"the (client|request) (cancelled|was cancelled)"), CancelledError),
    (re.compile(r"internal error"), TritonmindError),
)
_INVALID = re.compile(r"([\w.\[\]]+)=.* is invalid: ", re.DOTALL)


def told_error(message: str) -> TritonmindError:
    """The error that a server's text is about."""
    match = _INVALID.match(message)
    if match is not None:
        return _Told(message, match[1])
    for pattern, make in _KINDS:
        if pattern.match(message):
            return make(message)
    return UnavailableError(message)
