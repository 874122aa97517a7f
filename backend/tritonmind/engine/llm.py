"""The Python API: a workspace or a checkpoint, text or token ids in, text out."""

from __future__ import annotations

import queue
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeAlias

from tritonmind.chat_template import Message, load_chat_template
from tritonmind.engine.launch import start_engine
from tritonmind.errors import InvalidRequestError, UnavailableError
from tritonmind.grammars import GrammarCompiler
from tritonmind.hub import local_model
from tritonmind.messages import EngineRequest, FinishReason, TokenLogprob, TokenOutput
from tritonmind.model_source import open_model
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
        model_path: str,
        *,
        in_process: bool = False,
        model_name: str | None = None,
        chat_template: str | None = None,
        **overrides: object,
    ) -> None:
        path, name = local_model(model_path)
        source = open_model(
            path,
            dtype=overrides.get("dtype", "auto"),
            model_name=model_name or name,
            chat_template=chat_template,
        )
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
        params = params or SamplingParams()
        outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        answers: dict[int, _Answer] = {}
        try:
            for prompt in prompts:
                first = self._request(prompt, params)
                stream = text_stream(self.tokenizer, params)
                for request in siblings(first, params.n):
                    self.engine.submit(request, outputs.put)
                    answers[request.request_id] = _Answer(request, stream.sibling())
            while not all(answer.stream.finished for answer in answers.values()):
                output = outputs.get()
                answer = answers[output.request_id]
                if not answer.stream.finished:
                    self._take(answer, output)
        finally:
            self.engine.abort([number for number, answer in answers.items() if not answer.stream.finished])
        return [answer.completion() for answer in answers.values()]

    def stream_infer(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamDelta, None, None]:
        """Answer one prompt piece by piece, n of 1. Leaving early cancels the rest."""
        params = params or SamplingParams()
        if params.n != 1:
            raise InvalidRequestError("n", params.n, "a stream is one answer: call generate, or stream n times")
        request = self._request(prompt, params)
        answer = _Answer(request, text_stream(self.tokenizer, params))
        for output in self.engine.stream(request):
            delta = self._take(answer, output)
            yield StreamDelta(
                **vars(delta),
                num_prompt_tokens=len(request.prompt_token_ids),
                num_cached_tokens=answer.num_cached_tokens,
            )
            if answer.stream.finished:
                return

    def _request(self, prompt: Prompt, params: SamplingParams) -> EngineRequest:
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
        if not prompt or isinstance(prompt[0], int):
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


def pipeline(model_path: str, **overrides: object) -> LLM:
    """The LLM of a workspace or a checkpoint, as `LLM(model_path, **overrides)`."""
    return LLM(model_path, **overrides)  # type: ignore[arg-type]
