"""The Python API: a workspace or a checkpoint, text or token ids in, text out."""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeAlias

from tritonmind.chat_template import Message, load_chat_template
from tritonmind.engine.launch import start_engine
from tritonmind.errors import InvalidRequestError, UnavailableError
from tritonmind.grammars import GrammarCompiler
from tritonmind.hub import local_model
from tritonmind.messages import EngineRequest, FinishReason, TokenLogprob, TokenOutput
from tritonmind.model_source import open_model, opening_options
from tritonmind.sampling_params import GenerationDefaults, SamplingParams, resolve, siblings
from tritonmind.text_stream import TextDelta, TextStream, text_stream
from tritonmind.tokenizer import Tokenizer

# Text as it stands, token ids, or a conversation for the chat template.
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message]"


@dataclass(frozen=True)
class Completion:
    """One finished answer. num_cached_tokens: prompt tokens that came from the prefix cache.

    logprobs: one for each of token_ids, None unless num_logprobs asked for them. prompt_logprobs: one for each token of
    the prompt but the first, which has None, if num_prompt_logprobs asked for them.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(frozen=True, kw_only=True)
class StreamDelta(TextDelta):
    """What some tokens added to a streamed answer. num_cached_tokens: as in Completion."""

    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass
class _Answer:
    """An answer in the making."""

    request: EngineRequest
    stream: TextStream
    deltas: list[TextDelta] = field(default_factory=list)
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None

    def completion(self) -> Completion:
        reason = self.deltas[-1].finish_reason
        assert reason is not None
        return Completion(
            text="".join(delta.text for delta in self.deltas),
            token_ids=[token_id for delta in self.deltas for token_id in delta.token_ids],
            finish_reason=reason,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            logprobs=(
                None
                if self.request.num_logprobs is None
                else [logprob for delta in self.deltas for logprob in delta.logprobs or ()]
            ),
            prompt_logprobs=self.prompt_logprobs,
        )


class LLM:
    """A model ready to generate. Close it, or use it as a context manager: the engine is a process of its own.

    model_path: a workspace, or the Hugging Face directory, GGUF file or name on the hub that one could be made of.
    model_name, chat_template: of a checkpoint, as `tritonmind convert` takes them. overrides: fields of EngineConfig
    and of its parts, over the workspace's config.ini. warnings: what the user should know about the model.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        in_process: bool = False,
        model_name: str | None = None,
        chat_template: str | None = None,
        **overrides: object,
    ) -> None:
        opening = opening_options(overrides)
        path, name = local_model(model_path, allow_pickle=opening["allow_pickle"])
        source = open_model(path, model_name=model_name or name, chat_template=chat_template, **opening)
        self.model = source.model
        self.warnings = source.warnings
        self.tokenizer = Tokenizer.from_dir(source.tokenizer_dir)
        self.chat_template = load_chat_template(source.tokenizer_dir, self.tokenizer.special_tokens)
        self.defaults = GenerationDefaults.from_dir(source.tokenizer_dir)
        self._grammars = GrammarCompiler(
            self.tokenizer, vocab_size=self.model.vocab_size, eos_token_ids=self.model.eos_token_ids
        )
        self.engine = start_engine(str(path), dict(overrides), in_process=in_process)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine."""
        self._grammars.close()
        self.engine.shutdown()

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Answer all prompts, batched together; answers in the order of the prompts, n in a row for each."""
        outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        with self._batch(params or SamplingParams()) as batch:
            for prompt in prompts:
                batch.submit(prompt, outputs.put)
            while not batch.finished:
                batch.take(outputs.get())
            return batch.completions()

    async def generate_async(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """As `generate`, without holding up the event loop. Cancelling the task cancels what is not answered yet."""
        outputs, put = inbox()
        with self._batch(params or SamplingParams()) as batch:
            for prompt in prompts:
                batch.submit(prompt, put)
            while not batch.finished:
                batch.take(await outputs.get())
            return batch.completions()

    def stream_infer(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamDelta, None, None]:
        """Answer one prompt piece by piece, n of 1. Leaving early cancels the rest."""
        answer = self._new_answer(prompt, params or SamplingParams())
        for output in self.engine.stream(answer.request):
            yield self._streamed(answer, output)
            if answer.stream.finished:
                return

    async def stream_infer_async(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncGenerator[StreamDelta, None]:
        """As `stream_infer`, without holding up the event loop."""
        outputs, put = inbox()
        answer = self._new_answer(prompt, params or SamplingParams())
        number = answer.request.request_id
        self.engine.submit(answer.request, put)
        try:
            while not answer.stream.finished:
                yield self._streamed(answer, await outputs.get())
        finally:
            if not answer.stream.finished:
                self.engine.abort([number])

    @contextmanager
    def _batch(self, params: SamplingParams) -> Iterator[_Batch]:
        """Answers in the making; those that are not finished at the end are given up."""
        batch = _Batch(self, params)
        try:
            yield batch
        finally:
            batch.give_up()

    def _new_answer(self, prompt: Prompt, params: SamplingParams) -> _Answer:
        """Of a stream."""
        if params.n != 1:
            raise InvalidRequestError("n", params.n, "a stream is one answer: call generate, or stream n times")
        return _Answer(
            self.request(prompt, params), text_stream(self.tokenizer, params, continues=not _is_chat(prompt))
        )

    def _streamed(self, answer: _Answer, output: TokenOutput) -> StreamDelta:
        delta = self._take(answer, output)
        return StreamDelta(
            **vars(delta),
            num_prompt_tokens=len(answer.request.prompt_token_ids),
            num_cached_tokens=answer.num_cached_tokens,
        )

    def request(self, prompt: Prompt, params: SamplingParams) -> EngineRequest:
        """What the engine is sent for a prompt. Raises InvalidRequestError."""
        return resolve(
            params,
            self.defaults,
            request_id=self.engine.next_request_id(params.n),
            prompt_token_ids=self._encode(prompt),
            vocab_size=self.model.vocab_size,
            max_model_len=self.engine.info.max_model_len,
            eos_token_ids=self.model.eos_token_ids,
            encode_word=self.tokenizer.encode_word,
            check_guided=self._grammars.check,
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode_prompt(prompt)
        if isinstance(prompt, (bytes, dict)) or not hasattr(prompt, "__len__"):
            raise InvalidRequestError("prompt", prompt, "must be a text, token ids or messages")
        if not _is_chat(prompt):
            return [int(token_id) for token_id in prompt]  # type: ignore[arg-type]
        if self.chat_template is None:
            raise InvalidRequestError("prompt", prompt, "the checkpoint has no chat template: pass text or token ids")
        return self.tokenizer.encode(self.chat_template.render(prompt), add_special_tokens=False)  # type: ignore[arg-type]

    def _take(self, answer: _Answer, output: TokenOutput) -> TextDelta:
        """Add an engine output to its answer. One that a stop string ends is given up in the engine."""
        if output.finish_reason == "error":
            raise UnavailableError(output.error or "the engine failed")
        delta = answer.stream.push(
            output.token_ids, output.finish_reason, stop_token_id=output.stop_token_id, logprobs=output.logprobs
        )
        answer.deltas.append(delta)
        answer.num_cached_tokens = max(answer.num_cached_tokens, output.num_cached_tokens)
        answer.prompt_logprobs = output.prompt_logprobs or answer.prompt_logprobs
        if answer.stream.finished and output.finish_reason is None:
            self.engine.abort([output.request_id])
        return delta


def _is_chat(prompt: Prompt) -> bool:
    """Whether it is messages, not text or token ids."""
    return not isinstance(prompt, str) and bool(prompt) and not isinstance(prompt[0], int)


class _Batch:
    """The answers of one call of `generate`, by the engine's numbers of their requests."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._params = params
        self._answers: dict[int, _Answer] = {}

    @property
    def finished(self) -> bool:
        return all(answer.stream.finished for answer in self._answers.values())

    def submit(self, prompt: Prompt, on_output: Callable[[TokenOutput], None]) -> None:
        first = self._llm.request(prompt, self._params)
        stream = text_stream(self._llm.tokenizer, self._params, continues=not _is_chat(prompt))
        for request in siblings(first, self._params.n):
            self._llm.engine.submit(request, on_output)
            self._answers[request.request_id] = _Answer(request, stream.sibling())

    def take(self, output: TokenOutput) -> None:
        answer = self._answers[output.request_id]
        if not answer.stream.finished:
            self._llm._take(answer, output)

    def completions(self) -> list[Completion]:
        return [answer.completion() for answer in self._answers.values()]

    def give_up(self) -> None:
        self._llm.engine.abort([number for number, answer in self._answers.items() if not answer.stream.finished])


def inbox() -> tuple[asyncio.Queue[TokenOutput], Callable[[TokenOutput], None]]:
    """A queue of the running event loop, and how another thread puts something into it."""
    loop = asyncio.get_running_loop()
    outputs: asyncio.Queue[TokenOutput] = asyncio.Queue()

    def put(output: TokenOutput) -> None:
        # A loop that is closed has nobody left who waits.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(outputs.put_nowait, output)

    return outputs, put
