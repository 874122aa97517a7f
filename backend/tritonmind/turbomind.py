"""LMDeploy 0.1's Python interface, over this engine: programs written for it need another import line.

    >>> from tritonmind import turbomind as tm
    >>> tm_model = tm.TurboMind.from_pretrained(MODEL)
    >>> generator = tm_model.create_instance()
    >>> prompt = tm_model.model.get_prompt("What is the capital of France?")
    >>> input_ids = tm_model.tokenizer.encode(prompt)
    >>> for outputs in generator.stream_infer(session_id=0, input_ids=[input_ids], temperature=0):
    ...     res, tokens = outputs[0]
    >>> "Paris" in tm_model.tokenizer.decode(res.tolist())
    True
    >>> tm_model.close()

Unlike there: sampling options that are left out are the model's own, errors are raised, and `tokens` is the length of
`res`. Sessions are remembered as token ids, and their K and V found again in the prefix cache.
"""

from __future__ import annotations

import os
import queue
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tritonmind.chat_template import ChatTemplate, Message
from tritonmind.config import ModelConfig
from tritonmind.engine.llm import LLM, inbox
from tritonmind.errors import ConfigError, InvalidRequestError, UnavailableError
from tritonmind.hub import local_model
from tritonmind.messages import EngineRequest, TokenOutput
from tritonmind.model_source import open_model, opening_options
from tritonmind.prompts import next_turn
from tritonmind.request_fields import SessionFields
from tritonmind.sampling_params import SamplingParams
from tritonmind.sessions import (
    DEFAULT_MAX_SESSION_TOKENS,
    DEFAULT_MAX_SESSIONS,
    ChatTurn,
    SessionStore,
    Turn,
)
from tritonmind.tokenizer import Tokenizer

DEFAULT_OUTPUT_LEN = 512
# Of each row: all token ids of the answer so far, int32 [n], without the one that ended it, and n.
Outputs: TypeAlias = "list[tuple[npt.NDArray[np.int32], int]]"


class TurboMind:
    """A model in a process of its own. Close it, or use it as a context manager."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.tokenizer = TextTokenizer(llm.tokenizer)
        self.model = PromptTemplate(llm.chat_template)
        self.sessions = SessionStore(DEFAULT_MAX_SESSIONS, DEFAULT_MAX_SESSION_TOKENS)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        model_name: str | None = None,
        model_format: str | None = None,
        group_size: int | None = None,
        tp: int | None = None,
        **kwargs: object,
    ) -> TurboMind:
        """Start an engine on a workspace or a checkpoint.

        model_name: picks the chat template of a checkpoint that has none. model_format: hf for a model that is not in 4
        bits, awq or gptq, which are not told apart, for one that is; group_size: of its weights; both must be true of
        it where given. tp: ranks, as many as the weights are split for, 1 in this version. kwargs: as
        `pipeline`'s overrides.
        Raises TritonmindError with the cause when the engine cannot start.
        """
        if tp is not None:
            kwargs["tensor_parallel_size"] = tp
        opening = opening_options(kwargs)
        path, name = local_model(pretrained_model_name_or_path, allow_pickle=opening["allow_pickle"])
        name = model_name or name
        if model_format is not None or group_size:
            _check_format(open_model(path, model_name=name, **opening).model, model_format, group_size)
        return cls(LLM(str(path), model_name=name, **kwargs))  # type: ignore[arg-type]

    @property
    def session_len(self) -> int:
        """Tokens of a session, prompts and answers."""
        return self.llm.engine.info.max_model_len

    @property
    def eos_id(self) -> int:
        return self.llm.model.eos_token_ids[0]

    def create_instance(self, cuda_stream_id: int = 0) -> TurboMindInstance:
        """A way to ask. Instances share the sessions; each answers one call at a time. cuda_stream_id says nothing."""
        return TurboMindInstance(self)

    def close(self) -> None:
        """Stop the engine."""
        self.llm.close()

    def __enter__(self) -> TurboMind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TurboMindInstance:
    """Answers to token ids, within sessions."""

    def __init__(self, tm_model: TurboMind) -> None:
        self.tm_model = tm_model

    def stream_infer(
        self,
        session_id: int | Sequence[int],
        input_ids: Sequence[int] | Sequence[Sequence[int]],
        request_output_len: int = DEFAULT_OUTPUT_LEN,
        sequence_start: bool = True,
        sequence_end: bool = False,
        step: int = 0,
        stop: bool = False,
        top_p: float | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
        repetition_penalty: float | None = None,
        ignore_eos: bool = False,
        random_seed: int | None = None,
        stream_output: bool = False,
    ) -> Generator[Outputs, None, None]:
        """Answer one row of token ids, or several, each the next turn of its session.

        session_id: one for each row. sequence_start: forget what the session was before; sequence_end: forget it
        afterwards. step: go on from so many tokens of its history, 0 from all. stop: forget the sessions, and answer
        nothing. request_output_len: tokens of an answer, at most what session_len leaves. None: as the model says.
        stream_output: yield whenever there is something new, else once. Each item has all rows' answers so far.
        Raises TritonmindError for what cannot be answered; leaving early keeps what was answered until then.
        """
        outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        params = _sampling(request_output_len, top_p, top_k, temperature, repetition_penalty, ignore_eos, random_seed)
        call = self._begin(session_id, input_ids, params, sequence_start, sequence_end, step, stop)
        if call is None:
            return
        try:
            call.submit(outputs.put)
            while not call.finished:
                call.take(outputs.get())
                if stream_output and outputs.empty() and not call.finished:
                    yield call.outputs()
            yield call.outputs()
        finally:
            call.end()

    async def async_stream_infer(
        self,
        session_id: int | Sequence[int],
        input_ids: Sequence[int] | Sequence[Sequence[int]],
        request_output_len: int = DEFAULT_OUTPUT_LEN,
        sequence_start: bool = True,
        sequence_end: bool = False,
        step: int = 0,
        stop: bool = False,
        top_p: float | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
        repetition_penalty: float | None = None,
        ignore_eos: bool = False,
        random_seed: int | None = None,
        stream_output: bool = False,
    ) -> AsyncGenerator[Outputs, None]:
        """As `stream_infer`, without holding up the event loop."""
        outputs, put = inbox()
        params = _sampling(request_output_len, top_p, top_k, temperature, repetition_penalty, ignore_eos, random_seed)
        call = self._begin(session_id, input_ids, params, sequence_start, sequence_end, step, stop)
        if call is None:
            return
        try:
            call.submit(put)
            while not call.finished:
                call.take(await outputs.get())
                if stream_output and outputs.empty() and not call.finished:
                    yield call.outputs()
            yield call.outputs()
        finally:
            call.end()

    def _begin(
        self,
        session_id: int | Sequence[int],
        input_ids: Sequence[int] | Sequence[Sequence[int]],
        params: SamplingParams,
        start: bool,
        end: bool,
        step: int,
        stop: bool,
    ) -> _Call | None:
        """A call whose sessions are reserved; None if it was to forget them."""
        rows = self._rows(session_id, input_ids)
        if stop:
            for number, _ in rows:
                self.tm_model.sessions.stop(number, forget=True)
            return None
        turns = [
            (SessionFields(session_id=number, start=start, end=end, step=step or None), ids) for number, ids in rows
        ]
        return _Call(self.tm_model, turns, params)

    def _rows(
        self, session_id: int | Sequence[int], input_ids: Sequence[int] | Sequence[Sequence[int]]
    ) -> list[tuple[int, list[int]]]:
        """Session and token ids of each row. Raises InvalidRequestError."""
        if not len(input_ids):
            raise InvalidRequestError("input_ids", input_ids, "must have a token id, or a row of them, at least")
        is_one = isinstance(input_ids[0], (int, np.integer))
        rows: list[Any] = [input_ids] if is_one else list(input_ids)
        numbers: list[Any] = [session_id] if isinstance(session_id, (int, np.integer)) else list(session_id)
        if len(numbers) != len(rows) or len(set(numbers)) != len(numbers):
            raise InvalidRequestError(
                "session_id", session_id, f"there are {len(rows)} rows of input_ids: give each a session of its own"
            )
        return [(int(number), [int(i) for i in row]) for number, row in zip(numbers, rows, strict=True)]


@dataclass
class _Row:
    """One answer in the making."""

    turn: Turn
    request: EngineRequest
    token_ids: list[int]
    ended_by_token: bool = False
    finished: bool = False


class _Call:
    """The rows of one call. `end` must be called, whatever happened: it frees the sessions."""

    def __init__(
        self, tm_model: TurboMind, rows: list[tuple[SessionFields, list[int]]], params: SamplingParams
    ) -> None:
        self._tm_model = tm_model
        self._rows: dict[int, _Row] = {}
        self._submitted = False
        turns: list[Turn] = []
        try:
            for session, token_ids in rows:
                turn = tm_model.sessions.begin(session)
                turns.append(turn)
                request = tm_model.llm.request([*turn.text_history("input_ids"), *token_ids], params)
                self._rows[request.request_id] = _Row(turn, request, [])
        except BaseException:
            for turn in turns:
                tm_model.sessions.end(turn, None, [], [], ended_by_token=False)
            raise

    @property
    def finished(self) -> bool:
        return all(row.finished for row in self._rows.values())

    def submit(self, on_output: Callable[[TokenOutput], None]) -> None:
        self._tm_model.llm.engine.submit_all([row.request for row in self._rows.values()], on_output)
        self._submitted = True

    def take(self, output: TokenOutput) -> None:
        if output.finish_reason == "error":
            raise UnavailableError(output.error or "the engine failed")
        row = self._rows[output.request_id]
        row.token_ids += output.token_ids
        row.finished = output.finish_reason is not None
        row.ended_by_token = row.finished and output.stop_token_id is not None

    def outputs(self) -> Outputs:
        answers = [row.token_ids[: len(row.token_ids) - row.ended_by_token] for row in self._rows.values()]
        return [(np.array(answer, dtype=np.int32), len(answer)) for answer in answers]

    def end(self) -> None:
        """Give up what is not finished, and remember each row's tokens as its session's history."""
        if self._submitted:
            self._tm_model.llm.engine.abort([number for number, row in self._rows.items() if not row.finished])
        for row in self._rows.values():
            self._tm_model.sessions.end(
                row.turn, None, row.request.prompt_token_ids, row.token_ids, ended_by_token=row.ended_by_token
            )


class TextTokenizer:
    """The tokenizer as LMDeploy's programs call it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        return self._tokenizer.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    def encode(self, s: str, add_bos: bool = True) -> list[int]:
        """Token ids of a text. add_bos: as at a prompt's beginning; a text that begins with bos gets no second one."""
        return self._tokenizer.encode_prompt(s) if add_bos else self._tokenizer.encode_continuation(s)

    def decode(self, t: Sequence[int], offset: int | None = None) -> str:
        """Text of token ids, from `offset` on."""
        return self._tokenizer.decode(list(t)[offset or 0 :])


class PromptTemplate:
    """The chat template as LMDeploy's programs call it."""

    def __init__(self, chat_template: ChatTemplate | None) -> None:
        self._chat_template = chat_template

    def get_prompt(self, prompt: str, sequence_start: bool = True) -> str:
        """A user's turn as the model was trained to see it, the first of a conversation or a later one.

        A later one begins with what the template writes behind an answer. Without a template the text as it is.
        """
        if self._chat_template is None:
            return prompt
        said = [{"role": "user", "content": prompt}]
        if sequence_start:
            return self._chat_template.render(said)
        before = ChatTurn(({"role": "user", "content": "..."},), 0, 0, ended_by_token=False)
        return next_turn(self._chat_template.render, [before], said)

    def messages2prompt(self, messages: str | list[Message]) -> str:
        """A whole conversation, or a user's first turn. InvalidRequestError for an unknown role."""
        if isinstance(messages, str):
            return self.get_prompt(messages)
        if self._chat_template is None:
            raise InvalidRequestError("messages", messages, "the model has no chat template")
        return self._chat_template.render(messages)


def _sampling(
    request_output_len: int,
    top_p: float | None,
    top_k: int | None,
    temperature: float | None,
    repetition_penalty: float | None,
    ignore_eos: bool,
    random_seed: int | None,
) -> SamplingParams:
    return SamplingParams(
        max_tokens=request_output_len,
        top_p=top_p,
        top_k=top_k,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        ignore_eos=ignore_eos,
        seed=random_seed,
    )


def _check_format(model: ModelConfig, model_format: str | None, group_size: int | None) -> None:
    """ConfigError where the model is something else."""
    if model_format is not None:
        if model_format not in ("hf", "awq", "gptq"):
            raise ConfigError(f"model_format={model_format!r} must be hf, awq or gptq")
        if (model_format == "hf") != (model.weight_type != "int4"):
            raise ConfigError(f"model_format={model_format!r}, but the model's weights are {model.weight_type}")
    if group_size and group_size != model.group_size:
        raise ConfigError(f"group_size={group_size}, but the model's weights are in groups of {model.group_size}")
