"""An engine in a process of its own, behind the same request server that the Triton server's adapter has.

That server's threads make texts out of tokens. What they have for a request goes into one queue for all requests, whose
other end is the loop: one wake-up takes all that has come.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping

from tritonmind.chat_template import load_chat_template
from tritonmind.engine.client import EngineClient
from tritonmind.engine.launch import start_engine
from tritonmind.errors import CancelledError, TritonmindError
from tritonmind.live_request import Answer
from tritonmind.metrics import Metrics
from tritonmind.model_source import open_model, opening_options
from tritonmind.request_fields import ParsedRequest
from tritonmind.sampling_params import GenerationDefaults
from tritonmind.serving import DEFAULT_DRAIN_TIMEOUT_S, DEFAULT_PRIORITY, RequestServer
from tritonmind.sessions import DEFAULT_MAX_SESSION_TOKENS, DEFAULT_MAX_SESSIONS, SessionStore
from tritonmind.tokenizer import Tokenizer
from tritonmind_tools.api_server.backends import ServedModel, merged
from tritonmind_tools.api_server.prometheus import Registry
from tritonmind_tools.console_transport import Delta

# Texts are made while the interpreter's lock is held: more threads for it would only wait for each other.
NUM_LANES = 1


class LocalBackend:
    """Starts an engine on a workspace or a checkpoint, and again when it dies. Raises TritonmindError if it cannot.

    overrides: as LLM's. name: what the model is called, by default what its checkpoint says. chat_template: as
    open_model's. warnings: what the user should know about the model.
    """

    def __init__(
        self,
        path: str,
        overrides: Mapping[str, object],
        *,
        name: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        source = open_model(path, chat_template=chat_template, **opening_options(overrides))
        self.warnings = source.warnings
        tokenizer = Tokenizer.from_dir(source.tokenizer_dir)
        template = load_chat_template(source.tokenizer_dir, tokenizer.special_tokens)
        self._registry = Registry()
        self._mail = _Mail()
        name = name or source.model.model_name
        engines: list[EngineClient] = []

        def start() -> EngineClient:
            engine = start_engine(path, dict(overrides))
            engines.append(engine)
            return engine

        self._server = RequestServer(
            tokenizer=tokenizer,
            chat_template=template,
            defaults=GenerationDefaults.from_dir(source.tokenizer_dir),
            model=source.model,
            start=start,
            sessions=SessionStore(DEFAULT_MAX_SESSIONS, DEFAULT_MAX_SESSION_TOKENS),
            metrics=Metrics(self._registry, {"model": name}),
            default_priority=DEFAULT_PRIORITY,
            drain_timeout=DEFAULT_DRAIN_TIMEOUT_S,
            num_lanes=NUM_LANES,
        )
        self.info = engines[0].info
        self.model = ServedModel(
            name=name,
            created=int(time.time()),
            max_model_len=self.info.max_model_len,
            tokenizer=tokenizer,
            chat_template=template,
        )

    async def connect(self) -> None:
        self._mail.loop = asyncio.get_running_loop()

    async def answer(self, request: ParsedRequest) -> AsyncGenerator[list[Delta], None]:
        box = _Box(self._mail)
        live = self._server.accept(request, box)
        try:
            while not box.ended:
                batch = await box.take()
                if batch:
                    yield batch
        finally:
            if not box.ended:
                live.give_up(CancelledError("the client cancelled the request"))

    async def is_ready(self) -> bool:
        return self._server.is_ready()

    def metrics(self) -> str:
        return self._registry.text()

    def close(self) -> None:
        self._server.close()


class _Mail:
    """What has come for all requests since the loop was last woken up."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._items: deque[tuple[_Box, list[Delta] | TritonmindError | None]] = deque()
        self._is_told = False

    def post(self, box: _Box, item: list[Delta] | TritonmindError | None) -> None:
        """Any thread: hand an item over; None ends the request."""
        self._items.append((box, item))
        if not self._is_told:
            self._is_told = True
            assert self.loop is not None
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before the queue is read: what is appended from now on calls again.
        self._is_told = False
        while self._items:
            box, item = self._items.popleft()
            box.put(item)


class _Box:
    """One request's answers. Threads of the request server call it as its Responder; the loop takes."""

    def __init__(self, mail: _Mail) -> None:
        self.ended = False
        self._mail = mail
        self._finished: set[int] = set()  # answers that have said so
        self._batches: list[list[Delta]] = []
        self._error: TritonmindError | None = None
        self._is_last = False
        self._waiter: asyncio.Future[None] | None = None

    def send(self, answers: list[Answer], *, final: bool) -> None:
        batch = [
            _delta(index, answer)
            for index, answer in enumerate(answers)
            if index not in self._finished
            and (answer.num_output_tokens or answer.text or answer.finish_reason is not None)
        ]
        self._finished.update([delta.index for delta in batch if delta.finish_reason is not None])
        self._mail.post(self, batch)
        if final:
            self._mail.post(self, None)

    def fail(self, error: TritonmindError) -> None:
        self._mail.post(self, error)

    def finish(self) -> None:
        self._mail.post(self, TritonmindError("the request ended without an answer"))

    def is_cancelled(self) -> bool:
        return False  # the loop gives a request up by itself

    def put(self, item: list[Delta] | TritonmindError | None) -> None:
        if isinstance(item, list):
            self._batches.append(item)
        else:
            self._error, self._is_last = item, True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[Delta]:
        """All that has come, after waiting for something. Raises what the request failed with."""
        while not self._batches and not self._is_last:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        batches, self._batches = self._batches, []
        if self._is_last:
            self.ended = True
            if self._error is not None:
                raise self._error
        return merged(batches) if batches else []


def _delta(index: int, answer: Answer) -> Delta:
    return Delta(
        index=index,
        text=answer.text,
        token_ids=answer.token_ids,
        num_tokens=answer.num_output_tokens,
        num_input_tokens=answer.num_input_tokens,
        num_cached_tokens=answer.num_cached_tokens,
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
        logprobs=answer.logprobs,
        prompt_logprobs=answer.prompt_logprobs,
    )
