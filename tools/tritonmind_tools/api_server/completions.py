"""POST /v1/completions: texts or token ids that are gone on with, several prompts and n answers to each at once."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple

from tritonmind.request_fields import ParsedRequest
from tritonmind_tools.api_server.backends import Backend, Position
from tritonmind_tools.api_server.errors import refused
from tritonmind_tools.api_server.fields import invalid
from tritonmind_tools.api_server.logprobs import CompletionLogprobs
from tritonmind_tools.api_server.protocol import DEFAULT_COMPLETION_TOKENS, CompletionBody
from tritonmind_tools.api_server.replies import DONE, EVENT_STREAM, Writer, encode_json, event
from tritonmind_tools.api_server.structured import guided
from tritonmind_tools.api_server.usage import Usage
from tritonmind_tools.console_transport import Delta

# Fields of SamplingParams and of requests by OpenAI's names.
NAMES = {"num_logprobs": "logprobs", "include_stop": "include_stop_str_in_output", "input_ids": "prompt"}
NAMES["text_input"] = "prompt"
MAX_PROMPTS = 128

# A batch of deltas, and which prompt they answer.
Numbered = tuple[int, list[Delta]]


class Piece(NamedTuple):
    """What is new of the answer of that number."""

    number: int
    text: str
    logprobs: dict[str, list[Any]] | None
    finish_reason: str | None


class CompletionAnswer:
    """Requests for texts that follow prompts, and how their answers are written. Raises ApiError."""

    def __init__(self, body: CompletionBody, backend: Backend) -> None:
        self._body = body
        self._backend = backend
        self._n = body.n or 1
        if body.best_of is not None and body.best_of != self._n:
            raise refused("best_of", "send n requests and choose, or leave it out")
        if len(body.prompt) > MAX_PROMPTS:
            raise invalid("prompt", f"{len(body.prompt)} prompts, at most {MAX_PROMPTS} go in one request")
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options", "goes with stream=true")
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        # What is wanted is the prompt alone: one token is made and left out.
        self._echo_only = body.max_tokens == 0 and bool(body.echo)
        self._requests = [self._parsed(prompt) for prompt in body.prompt]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(16)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        num_answers = self._n * len(self._requests)
        self._logprobs = [
            CompletionLogprobs(
                body.logprobs or 0,
                backend.model.tokenizer,
                skip_special_tokens=body.skip_special_tokens is not False,
            )
            for _ in range(num_answers)
        ]
        self._echoed: set[int] = set()
        self._prompt_logprobs: dict[int, list[Position | None]] = {}  # by the prompt's number
        self._usage = Usage()

    async def write(self, writer: Writer) -> None:
        """Answer, all at once or as it comes."""
        async with aclosing(self._answers()) as batches:
            await (self._stream if self._body.stream else self._collect)(batches, writer)

    async def _collect(self, batches: AsyncGenerator[Numbered, None], writer: Writer) -> None:
        num_answers = self._n * len(self._requests)
        texts = [""] * num_answers
        reasons = ["stop"] * num_answers
        logprobs: list[dict[str, list[Any]]] = [{} for _ in range(num_answers)]
        async for prompt, batch in batches:
            for delta in batch:
                index, text, more, reason = self._piece(prompt, delta)
                texts[index] += text
                reasons[index] = reason or reasons[index]
                for name, values in (more or {}).items():
                    logprobs[index].setdefault(name, []).extend(values)
        choices = [
            {
                "index": index,
                "text": texts[index],
                "logprobs": logprobs[index] or None,
                "finish_reason": reasons[index],
            }
            for index in range(num_answers)
        ]
        await writer.whole(encode_json({**self._head, "choices": choices, "usage": self._usage.body()}))

    async def _stream(self, batches: AsyncGenerator[Numbered, None], writer: Writer) -> None:
        async for prompt, batch in batches:
            if writer.media_type is None:
                await writer.begin(EVENT_STREAM)
            events = []
            for delta in batch:
                index, text, logprobs, reason = self._piece(prompt, delta)
                if text or logprobs or reason:
                    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
                    chunk = {**self._head, "choices": [choice]}
                    if self._include_usage:
                        chunk["usage"] = None
                    events.append(event(chunk))
            if events:
                await writer.write(b"".join(events))
        last = b""
        if self._include_usage:
            last = event({**self._head, "choices": [], "usage": self._usage.body()})
        await writer.end(last + DONE)

    def _piece(self, prompt: int, delta: Delta) -> Piece:
        """What a delta for the prompt of that number adds to one of its answers."""
        if self._echo_only:
            delta = replace(
                delta,
                text="",
                token_ids=[],
                num_tokens=0,
                logprobs=[],
                finish_reason="length" if delta.finish_reason else None,
            )
        index = prompt * self._n + delta.index
        self._usage.add([delta], prompt)
        if delta.prompt_logprobs is not None:  # with the first answer's first token
            self._prompt_logprobs[prompt] = delta.prompt_logprobs
        echo = ""
        logprobs: dict[str, list[Any]] = {}
        if self._body.echo and index not in self._echoed:
            self._echoed.add(index)
            echo = self._prompt_text(prompt)
            if prompt in self._prompt_logprobs:
                ids = self._prompt_ids(prompt)
                logprobs = self._logprobs[index].of_prompt(ids, self._prompt_logprobs[prompt], echo)
        if delta.logprobs:
            for name, values in self._logprobs[index].of(delta.token_ids, delta.logprobs).items():
                logprobs.setdefault(name, []).extend(values)
        reason = "stop" if delta.finish_reason == "cancelled" else delta.finish_reason
        return Piece(index, echo + delta.text, logprobs or None, reason)

    def _prompt_text(self, number: int) -> str:
        prompt = self._body.prompt[number]
        if isinstance(prompt, str):
            return prompt
        tokenizer = self._backend.model.tokenizer
        assert tokenizer is not None  # checked in _parsed
        return tokenizer.decode(prompt)

    def _prompt_ids(self, number: int) -> list[int]:
        prompt = self._body.prompt[number]
        tokenizer = self._backend.model.tokenizer
        assert tokenizer is not None  # checked in _parsed
        return tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt

    async def _answers(self) -> AsyncGenerator[Numbered, None]:
        """What comes for all prompts, with their numbers."""
        if len(self._requests) == 1:
            async with aclosing(self._backend.answer(self._requests[0])) as batches:
                async for batch in batches:
                    yield 0, batch
            return
        queue: asyncio.Queue[Numbered | BaseException | None] = asyncio.Queue()

        async def run(number: int, request: ParsedRequest) -> None:
            try:
                async with aclosing(self._backend.answer(request)) as batches:
                    async for batch in batches:
                        queue.put_nowait((number, batch))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.ensure_future(run(number, request)) for number, request in enumerate(self._requests)]
        try:
            num_live = len(tasks)
            while num_live:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    num_live -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _parsed(self, prompt: str | list[int]) -> ParsedRequest:
        body = self._body
        own: dict[str, Any] = {"guided": guided(body.response_format)}
        own["max_tokens"] = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if self._echo_only:
            own["max_tokens"] = 1
        if body.logprobs is not None:
            own["num_logprobs"] = body.logprobs
        if body.echo and (body.logprobs is not None or not isinstance(prompt, str)):
            if self._backend.model.tokenizer is None:
                raise refused("echo", "with logprobs or token ids needs the tokenizer, which a Triton server keeps")
            if body.logprobs is not None:
                own["num_prompt_logprobs"] = body.logprobs
        if isinstance(prompt, str) and not prompt:
            raise invalid("prompt", "is empty: send at least one character")
        outputs = {"logprobs"} if body.logprobs is not None else set()
        if "num_prompt_logprobs" in own:
            outputs.add("prompt_logprobs")
        return ParsedRequest(
            text=prompt if isinstance(prompt, str) else None,
            input_ids=None if isinstance(prompt, str) else prompt,
            params=body.sampling_params(**own),
            stream=bool(body.stream),
            outputs=frozenset(outputs),
        )
