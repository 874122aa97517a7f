"""What a load is put on: a model in a Triton server over gRPC, or an OpenAI completions endpoint over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from tritonmind.errors import ConfigError, TritonmindError
from tritonmind_tools.triton_client import parse_address

MAX_LINE_BYTES = 1 << 24
_GRPC_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
_TRITON_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
# What a client of text asks for, and what the measurement counts.
_TRITON_OUTPUTS = ("text_output", "num_output_tokens", "num_cached_tokens", "finish_reason")


class EndpointError(TritonmindError):
    """A request failed. The message says how, in the endpoint's own words where it has any."""


class Piece(NamedTuple):
    """One message of an answer. total_tokens: of the answer as far as the endpoint says, num_cached: of its prompt."""

    num_tokens: int
    total_tokens: int = 0
    num_cached: int = 0


class Endpoint(Protocol):
    """Takes requests as bytes that were made before. Greedy, and on past eos."""

    def body(self, prompt: Sequence[int] | str, num_tokens: int) -> bytes:
        """The request for an answer of `num_tokens` to token ids or a text."""

    def stream(self, body: bytes) -> AsyncIterator[Piece]:
        """The answer's messages as they come. Raises EndpointError."""


def check_url(url: str) -> None:
    """Raise ConfigError saying what is wrong with an endpoint's address."""
    if url.startswith(("http://", "https://")):
        OpenAiEndpoint(url, "")
    else:
        parse_address(url)


@contextlib.asynccontextmanager
async def connect(url: str, model: str) -> AsyncIterator[Endpoint]:
    """The endpoint at HOST:PORT (gRPC of a Triton server) or at http(s)://HOST:PORT/v1 (OpenAI).

    Raises ConfigError for a malformed http address.
    """
    if url.startswith(("http://", "https://")):
        yield OpenAiEndpoint(url, model)
        return
    from grpc import aio

    async with aio.insecure_channel(url, options=_GRPC_OPTIONS) as channel:
        yield TritonEndpoint(channel, model)


class TritonEndpoint:
    """A model of ours in a Triton server: one gRPC stream a request, decoded no further than is counted."""

    def __init__(self, channel: Any, model: str) -> None:
        from tritonclient.grpc import service_pb2

        self._messages = service_pb2
        self._model = model
        self._call = channel.stream_stream(
            _TRITON_STREAM, response_deserializer=service_pb2.ModelStreamInferResponse.FromString
        )

    def body(self, prompt: Sequence[int] | str, num_tokens: int) -> bytes:
        options = json.dumps({"temperature": 0, "ignore_eos": True, "max_tokens": num_tokens}).encode()
        request = self._messages.ModelInferRequest(model_name=self._model)
        request.parameters["triton_enable_empty_final_response"].bool_param = True

        def add(name: str, kind: str, length: int, raw: bytes) -> None:
            tensor = request.inputs.add(name=name, datatype=kind)
            tensor.shape.append(length)
            request.raw_input_contents.append(raw)

        def text(value: bytes) -> bytes:
            return len(value).to_bytes(4, "little") + value

        if isinstance(prompt, str):
            add("text_input", "BYTES", 1, text(prompt.encode()))
        else:
            add("input_ids", "INT32", len(prompt), b"".join(number.to_bytes(4, "little") for number in prompt))
        add("stream", "BOOL", 1, b"\x01")
        add("sampling_parameters", "BYTES", 1, text(options))
        for name in _TRITON_OUTPUTS:
            request.outputs.add(name=name)
        return bytes(request.SerializeToString())

    async def stream(self, body: bytes) -> AsyncIterator[Piece]:
        from grpc import RpcError

        call = self._call()
        try:
            await call.write(body)
            async for message in call:
                if message.error_message:
                    raise EndpointError(message.error_message)
                response = message.infer_response
                yield _triton_piece(response)
                if response.parameters["triton_final_response"].bool_param:
                    await call.done_writing()
        except RpcError as error:
            raise EndpointError(f"{error.code()}: {error.details()}") from None
        finally:
            call.cancel()


def _triton_piece(response: Any) -> Piece:
    numbers = {"num_output_tokens": 0, "num_cached_tokens": 0}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.name in numbers:
            numbers[tensor.name] = int.from_bytes(raw[:4], "little")
    return Piece(numbers["num_output_tokens"], num_cached=numbers["num_cached_tokens"])


class OpenAiEndpoint:
    """`/completions` of an OpenAI API, answered as server-sent events, on one connection a request.

    A message counts as one token, unless the endpoint says how many there are by then (`usage`).
    """

    def __init__(self, url: str, model: str) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise ConfigError(f"address {url!r} must be http://HOST:PORT/v1, as OpenAI clients take it")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._tls else 80)
        self._path = f"{parts.path.rstrip('/')}/completions"
        self._netloc = parts.netloc
        self._model = model

    def body(self, prompt: Sequence[int] | str, num_tokens: int) -> bytes:
        content = json.dumps(
            {
                "model": self._model,
                "prompt": prompt if isinstance(prompt, str) else list(prompt),
                "max_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._netloc}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    async def stream(self, body: bytes) -> AsyncIterator[Piece]:
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=MAX_LINE_BYTES)
        except OSError as error:
            raise EndpointError(f"no server answers at {self._netloc}: {error}") from None
        try:
            writer.write(body)
            lines = _content_lines(reader)
            async for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    return
                yield _openai_piece(json.loads(data))
            raise EndpointError("the answer ended without [DONE]")
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise EndpointError(f"the answer broke off: {error!r}") from None
        finally:
            writer.close()


def _openai_piece(event: Any) -> Piece:
    if not isinstance(event, dict):
        raise EndpointError(f"the answer holds {json.dumps(event)[:200]} where an object must be")
    if "error" in event:
        raise EndpointError(json.dumps(event["error"]))
    usage = event.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    says_something = any(choice.get("text") for choice in event.get("choices", ()))
    return Piece(int(says_something), usage.get("completion_tokens") or 0, details.get("cached_tokens") or 0)


async def _content_lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines of an HTTP response's content. EndpointError with the content if the status is not 200."""
    status = (await reader.readline()).split(maxsplit=2)
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip().lower()
    chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
    if len(status) < 2 or status[1] != b"200":
        content = b"".join([part async for part in _parts(reader, chunked)])
        raise EndpointError(f"HTTP {b' '.join(status[1:]).decode()}: {content.decode(errors='replace')[:1000]}")
    rest = b""
    async for part in _parts(reader, chunked):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    yield rest


async def _parts(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    if not chunked:
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
