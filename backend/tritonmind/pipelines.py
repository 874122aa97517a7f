"""`pipeline(path)`: a model in a process of its own, asked by calling it.

>>> from tritonmind import SamplingParams, pipeline
>>> short = SamplingParams(temperature=0, max_tokens=16)
>>> with pipeline(MODEL) as pipe:
...     answer = pipe("What is the capital of France?", short)
...     talk = pipe.chat("Name one river.", gen_config=short)
...     talk = pipe.chat("Where is it?", talk, gen_config=short)
>>> "Paris" in answer.text
True
>>> [message["role"] for message in talk.messages]
['user', 'assistant', 'user', 'assistant']
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from tritonmind.chat_template import Message
from tritonmind.engine.llm import LLM, Completion, Prompt, StreamDelta
from tritonmind.errors import InvalidRequestError
from tritonmind.sampling_params import SamplingParams


@dataclass(frozen=True)
class Chat:
    """A conversation so far. response: the last answer. Frozen: a reply to it is a new one, and several may follow."""

    messages: tuple[Message, ...] = ()
    response: Completion | None = None


class Pipeline(LLM):
    """An LLM whose texts are what a user says: the model's chat template makes prompts of them.

    Where a model has no template, and for do_preprocess False, a text is continued as it stands, as in LLM. Token ids
    and lists of messages are prompts as they are.
    """

    @overload
    def __call__(
        self, prompts: str | Message, gen_config: SamplingParams | None = None, *, do_preprocess: bool = True
    ) -> Completion: ...
    @overload
    def __call__(
        self, prompts: Sequence[Any], gen_config: SamplingParams | None = None, *, do_preprocess: bool = True
    ) -> Any: ...
    def __call__(
        self, prompts: Any, gen_config: SamplingParams | None = None, *, do_preprocess: bool = True
    ) -> Completion | list[Completion]:
        """Answer one prompt, or a list of them batched together; of each n answers in a row.

        One prompt is a text, a list of token ids or a list of messages; its result is a Completion where n is 1, else a
        list, as for a list of prompts. Raises InvalidRequestError for a prompt or an option that is wrong.
        """
        params = gen_config or SamplingParams()
        wanted, is_one = self._wanted(prompts, do_preprocess)
        completions = self.generate(wanted, params)
        return completions[0] if is_one and params.n == 1 else completions

    async def infer_async(
        self, prompts: Any, gen_config: SamplingParams | None = None, *, do_preprocess: bool = True
    ) -> Any:
        """As calling it, without holding up the event loop. Cancelling the task cancels the answers."""
        params = gen_config or SamplingParams()
        wanted, is_one = self._wanted(prompts, do_preprocess)
        completions = await self.generate_async(wanted, params)
        return completions[0] if is_one and params.n == 1 else completions

    def stream(
        self, prompt: Prompt, gen_config: SamplingParams | None = None, *, do_preprocess: bool = True
    ) -> Generator[StreamDelta, None, None]:
        """Answer one prompt piece by piece. Leaving early cancels the rest."""
        yield from self.stream_infer(self.prompt(prompt, do_preprocess), gen_config)

    async def stream_async(
        self, prompt: Prompt, gen_config: SamplingParams | None = None, *, do_preprocess: bool = True
    ) -> AsyncGenerator[StreamDelta, None]:
        """As `stream`, without holding up the event loop."""
        async for delta in self.stream_infer_async(self.prompt(prompt, do_preprocess), gen_config):
            yield delta

    def chat(self, prompt: str, session: Chat | None = None, gen_config: SamplingParams | None = None) -> Chat:
        """Say something in a conversation, a new one by default. What was said before is found in the prefix cache."""
        messages = _said(prompt, session)
        return _answered(messages, self.generate([messages], gen_config)[0])

    async def chat_async(
        self, prompt: str, session: Chat | None = None, gen_config: SamplingParams | None = None
    ) -> Chat:
        """As `chat`, without holding up the event loop."""
        messages = _said(prompt, session)
        return _answered(messages, (await self.generate_async([messages], gen_config))[0])

    def _wanted(self, prompts: Any, do_preprocess: bool) -> tuple[list[Prompt], bool]:
        """What `generate` takes for the prompts, and whether they are one."""
        is_one = is_one_prompt(prompts)
        return [self.prompt(each, do_preprocess) for each in ([prompts] if is_one else prompts)], is_one

    def prompt(self, prompt: Prompt, do_preprocess: bool = True) -> Prompt:
        """What LLM's methods take for `prompt`: a text that is to go through the chat template becomes a message."""
        if isinstance(prompt, str) and do_preprocess and self.chat_template is not None:
            return [{"role": "user", "content": prompt}]
        return prompt


def pipeline(
    model_path: str | os.PathLike[str],
    *,
    model_name: str | None = None,
    chat_template: str | None = None,
    **overrides: object,
) -> Pipeline:
    """The Pipeline of a workspace or a checkpoint.

    model_name, chat_template: of a checkpoint, as `tritonmind convert` takes them. overrides: fields of EngineConfig
    and of its parts, such as max_num_seqs, cache_max_entry_count, device or quant_policy. Raises TritonmindError with
    the cause when the engine cannot start.
    """
    return Pipeline(model_path, model_name=model_name, chat_template=chat_template, **overrides)  # type: ignore[arg-type]


def is_one_prompt(prompts: Any) -> bool:
    """Whether it is a prompt and not a list of them: a text, token ids, or messages."""
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError("prompts", prompts, "must be a text, token ids, messages, or a list of such prompts")
    return bool(prompts) and isinstance(prompts[0], (int, dict))


def _said(prompt: str, session: Chat | None) -> list[Message]:
    return [*(session or Chat()).messages, {"role": "user", "content": prompt}]


def _answered(messages: list[Message], completion: Completion) -> Chat:
    return Chat((*messages, {"role": "assistant", "content": completion.text}), completion)
