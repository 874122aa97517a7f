"""`tritonmind serve api_client`: the model of an OpenAI API server in the console. Needs only httpx and httpx-sse."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import queue
import threading
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from tritonmind.errors import ConfigError, TritonmindError, UnavailableError
from tritonmind_tools import console
from tritonmind_tools.console_transport import Delta, Message, Status, require

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT_S = 5.0
API_KEY_VARIABLE = "TRITONMIND_API_KEY"
_SCHEMES = ("http://", "https://")
# Reasoning comes in a field of its own; in a conversation it stands where the model wrote it.
_THINK, _THINK_END = "<think>\n", "\n</think>\n\n"
# Fields of SamplingParams that have another name there; vLLM's servers take the same.
_NAMES = {"include_stop": "include_stop_str_in_output"}
_Event: TypeAlias = "Delta | TritonmindError | None"


class ApiError(TritonmindError):
    """The server refused a request, in its own words. status: of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ApiServer:
    """An OpenAI API server, ours or another's.

    url: http://HOST:PORT, with or without /v1. model: the one to ask, or the first that the server lists.
    Raises ConfigError for a malformed url.
    """

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        require("httpx", "httpx_sse")
        import httpx

        self.url = _checked_url(url)
        self._model = model
        self._settings: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            # An answer may take as long as it takes to begin; a cancel ends the wait.
            "timeout": httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            "verify": httpx.create_ssl_context(),
        }

    def connect(self) -> ApiTransport:
        """Raises UnavailableError naming the url where no OpenAI API answers, ConfigError for an unknown model."""
        names = self._model_names()
        if self._model is not None and self._model not in names:
            raise ConfigError(f"the server at {self.url} has no model {self._model!r}; it has {', '.join(names)}")
        return ApiTransport(self, self._model or names[0])

    def status(self) -> Status:
        try:
            names = self._model_names()
            health = self._get("/health")
        except TritonmindError as error:
            return Status(is_ready=False, text=str(error))
        # Not every server has that route.
        if health.status_code >= 500:
            return Status(is_ready=False, text=f"the server at {self.url} says that it is not ready")
        return Status(is_ready=True, text=f"{self._model or names[0]}, API server {self.url}")

    def close(self) -> None:
        """Nothing is held between answers."""

    def async_client(self) -> httpx.AsyncClient:
        """For one answer: the next one finds a server that came back."""
        import httpx

        return httpx.AsyncClient(**self._settings)

    def _model_names(self) -> list[str]:
        response = self._get("/v1/models")
        if response.status_code != 200:
            raise failure_of(response.status_code, response.text, self.url)
        try:
            names = [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, TypeError, KeyError):
            names = []
        if not names:
            raise UnavailableError(f"what answers at {self.url} is no OpenAI API server: it lists no models")
        return names

    def _get(self, path: str) -> httpx.Response:
        import httpx

        try:
            with httpx.Client(**self._settings | {"timeout": CONNECT_TIMEOUT_S}) as client:
                return client.get(self.url + path)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"no API server answers at {self.url} ({_reason(error)}): is it started, is this its port?"
            ) from None


class ApiTransport:
    """One conversation with an API server. Its history goes with every request."""

    def __init__(self, server: ApiServer, model: str) -> None:
        self.title = f"{model} at {server.url}"
        self._server = server
        self._model = model
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()

    def stream(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Generator[Delta, None, None]:
        events = self._events = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        answer = loop.create_task(self._pump(messages, options, events))
        threading.Thread(target=_run, args=(loop, answer), name="answer", daemon=True).start()
        try:
            while True:
                event = events.get()
                if isinstance(event, TritonmindError):
                    raise event
                delta = event or Delta(finish_reason="cancelled")
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(answer.cancel)

    def cancel(self) -> None:
        self._events.put(None)

    def close(self) -> None:
        """Each answer has a connection of its own, which ends with it."""

    async def _pump(
        self, messages: Sequence[Message], options: Mapping[str, Any], events: queue.SimpleQueue[_Event]
    ) -> None:
        """Carry an answer to `events`. Being cancelled closes the connection, which cancels it at the server."""
        import httpx
        from httpx_sse import SSEError

        lost = f"the connection to {self._server.url} is lost"
        try:
            async for delta in self._deltas(messages, options):
                events.put(delta)
        except TritonmindError as error:
            events.put(error)
        except (SSEError, ValueError, TypeError, LookupError, AttributeError) as error:
            events.put(UnavailableError(f"what answers at {self._server.url} is no OpenAI API server: {error!r}"))
        except httpx.ConnectError as error:
            events.put(UnavailableError(f"no API server answers at {self._server.url} ({_reason(error)})"))
        except httpx.HTTPError as error:
            events.put(UnavailableError(f"{lost} ({_reason(error)}): the next question connects again"))
        # A last Delta or an error has been taken by now; this is for a stream that just stopped.
        events.put(UnavailableError(f"{lost} in the middle of an answer: the next question connects again"))

    async def _deltas(self, messages: Sequence[Message], options: Mapping[str, Any]) -> AsyncGenerator[Delta, None]:
        """The answer as it comes; the last Delta has what the server counted."""
        from httpx_sse import aconnect_sse

        body = {
            "model": self._model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **{_NAMES.get(name, name): value for name, value in options.items()},
        }
        answer = _Answer()
        async with (
            self._server.async_client() as client,
            aconnect_sse(client, "POST", f"{self._server.url}/v1/chat/completions", json=body) as source,
        ):
            if source.response.status_code != 200:
                text = (await source.response.aread()).decode(errors="replace")
                raise failure_of(source.response.status_code, text, self._server.url)
            async for event in source.aiter_sse():
                if event.data == "[DONE]":
                    break
                text = answer.take(json.loads(event.data))
                if text:
                    yield Delta(text=text, num_tokens=1)
        if answer.finish_reason is not None:
            yield answer.last()


class _Answer:
    """What the chunks of one answer say in sum. A chunk counts as one token until the server has counted."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self._is_thinking = False
        self._num_chunks = 0
        self._usage: dict[str, Any] = {}

    def take(self, chunk: dict[str, Any]) -> str:
        """The text that a chunk adds. Raises what the server reports in it."""
        if "error" in chunk:
            raise ApiError(_message(chunk) or "the server gave no reason", 200)
        self._usage = chunk.get("usage") or self._usage
        text = ""
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            text += self._thought(delta.get("reasoning_content") or delta.get("reasoning") or "")
            text += self._said(delta.get("content") or "")
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self._num_chunks += bool(text)
        return text

    def last(self) -> Delta:
        details = self._usage.get("prompt_tokens_details") or {}
        return Delta(
            text=_THINK_END if self._is_thinking else "",
            num_tokens=self._usage.get("completion_tokens", self._num_chunks) - self._num_chunks,
            num_input_tokens=self._usage.get("prompt_tokens", 0),
            num_cached_tokens=details.get("cached_tokens") or 0,
            finish_reason=self.finish_reason,
        )

    def _thought(self, text: str) -> str:
        if text and not self._is_thinking:
            self._is_thinking = True
            return _THINK + text
        return text

    def _said(self, text: str) -> str:
        if text and self._is_thinking:
            self._is_thinking = False
            return _THINK_END + text
        return text


def failure_of(status: int, text: str, url: str) -> TritonmindError:
    """What an HTTP answer other than 200 means: the server's own words, where it is an OpenAI API server."""
    try:
        message = _message(json.loads(text))
    except ValueError:
        message = None
    if message is None:
        return UnavailableError(f"what answers at {url} is no OpenAI API server: HTTP status {status}")
    if status == 401:
        return ApiError(f"{message} (give the server's key with --api-key or {API_KEY_VARIABLE})", status)
    return ApiError(message, status)


def _message(body: Any) -> str | None:
    """The message of an error object: OpenAI's, or FastAPI's `detail`."""
    if not isinstance(body, dict):
        return None
    error = body.get("error", body.get("detail"))
    message = error.get("message") if isinstance(error, dict) else error
    return str(message) if message else None


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _run(loop: asyncio.AbstractEventLoop, answer: asyncio.Task[None]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(answer)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _checked_url(url: str) -> str:
    """The url without /v1 and a slash at its end."""
    if not url.startswith(_SCHEMES):
        raise ConfigError(f"url {url!r} must begin with http:// or https://, e.g. http://127.0.0.1:23333")
    import httpx

    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL as error:
        raise ConfigError(f"url {url!r} is invalid: {error}") from None
    if not host:
        raise ConfigError(f"url {url!r} has no host, e.g. http://127.0.0.1:23333")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def api_key(args: argparse.Namespace) -> str | None:
    """The key of a command line or of the environment."""
    key: str | None = args.api_key
    return key or os.environ.get(API_KEY_VARIABLE) or None


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """How to talk to an API server."""
    parser.add_argument("--api-key", metavar="KEY", help=f"the server's key (default: the variable {API_KEY_VARIABLE})")


_EXAMPLES = """examples:
  tritonmind serve api_client http://localhost:23333                    talk; an empty line sends, /help says more
  tritonmind serve api_client http://localhost:23333 --system 'Be brief.'
  echo 'Name three rivers.' | tritonmind serve api_client http://localhost:23333 --temperature 0 > answer.txt

In a pipe each paragraph is a question, answers go to stdout and statistics to stderr.
"""


def register(subparsers: Any) -> None:
    """Add `api_client` to the subparsers of `tritonmind serve`."""
    parser = subparsers.add_parser(
        "api_client",
        help="chat with an OpenAI API server in the terminal",
        description="Chat with a model that `tritonmind serve api_server`, or another OpenAI API server, serves.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", metavar="URL", help="the server's address, e.g. http://localhost:23333")
    parser.add_argument("--model", metavar="NAME", help="which of the server's models (default: the first)")
    add_server_arguments(parser)
    console.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends. Raises TritonmindError when the server cannot be reached or an option is wrong."""
    source = partial(ApiServer, args.url, api_key=api_key(args), model=args.model)
    return console.converse(source, args, opening=f"connecting to {args.url}")
