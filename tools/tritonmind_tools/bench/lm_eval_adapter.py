"""The engine under lm-evaluation-harness: what its tasks ask of a model, answered by an LLM as it serves.

Log-likelihoods are the engine's log-probabilities of prompt tokens; texts are generated with the options of the task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tritonmind.engine.llm import LLM
from tritonmind.errors import ConfigError
from tritonmind.messages import TokenLogprob
from tritonmind.sampling_params import SamplingParams

NUM_REQUESTS = 256  # submitted at a time: the engine batches them, and their prompts wait in its queue
MAX_GENERATED = 256  # tokens of an answer, where a task does not say
# Options of a task by our names; those below are the harness's own.
OPTIONS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed"}
ENDS, LENGTHS, SAMPLES = "until", ("max_gen_toks", "max_new_tokens", "max_tokens"), "do_sample"


class _Scored(NamedTuple):
    """A prompt whose last `num_scored` tokens are to be scored."""

    prompt: list[int]
    num_scored: int


class EngineScorer:
    """The three questions of the harness, on plain tuples; independent of its classes."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        # A request generates one token at least, and its prompt must leave room for it.
        self.max_prompt = llm.engine.info.max_model_len - 1
        bos = llm.tokenizer.bos_token_id
        self.prefix_token_id = llm.model.eos_token_ids[0] if bos is None else bos

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(context, continuation) -> log-probability of the continuation, and whether greedy decoding would give it.

        A pair that is longer than the model's context loses its beginning. Raises ConfigError for a continuation that
        does not fit on its own.
        """
        scored = [self._pair(context, continuation) for context, continuation in pairs]
        return [
            (sum(token.logprob for token in tokens), all(token.rank == 1 for token in tokens))
            for tokens in self._score(scored)
        ]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of each whole text, behind the token that begins a text.

        One longer than the context is read in windows: each token is scored once, and windows but the first are full.
        """
        windows: list[_Scored] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            for window in self._windows(self._encode(text)):
                windows.append(window)
                owners.append(number)
        totals = [0.0] * len(texts)
        for number, tokens in zip(owners, self._score(windows), strict=True):
            totals[number] += sum(token.logprob for token in tokens)
        return totals

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """(context, options) -> the text generated, without the stop string. Greedy unless do_sample says otherwise."""
        answers = [""] * len(requests)
        groups: dict[str, tuple[SamplingParams, list[int]]] = {}
        for number, (_, options) in enumerate(requests):
            params = sampling_params(options)
            groups.setdefault(repr(params), (params, []))[1].append(number)
        for params, numbers in groups.values():
            room = self.max_prompt + 1 - (params.max_tokens or 1)
            if room < 1:
                raise ConfigError(f"max_gen_toks={params.max_tokens} leaves no room for a prompt: raise session_len")
            for begin in range(0, len(numbers), NUM_REQUESTS):
                part = numbers[begin : begin + NUM_REQUESTS]
                prompts = [self._prompt(requests[number][0])[-room:] for number in part]
                for number, completion in zip(part, self.llm.generate(prompts, params), strict=True):
                    answers[number] = completion.text
        return answers

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Messages by the checkpoint's chat template."""
        if self.llm.chat_template is None:
            raise ConfigError("the checkpoint has no chat template: leave --apply-chat-template out")
        return self.llm.chat_template.render(
            [dict(message) for message in messages], add_generation_prompt=add_generation_prompt
        )

    def _encode(self, text: str) -> list[int]:
        return self.llm.tokenizer.encode(text, add_special_tokens=False)

    def _prompt(self, text: str) -> list[int]:
        return self.llm.tokenizer.encode_prompt(text) or [self.prefix_token_id]

    def _pair(self, context: str, continuation: str) -> _Scored:
        """As the harness cuts them: spaces before the border belong to the continuation, which is encoded in place."""
        kept = context.rstrip()
        whole = self._prompt(context + continuation)
        head = self._prompt(kept) if kept else [self.prefix_token_id]
        if not kept:
            whole = [*head, *self._encode(context + continuation)]
        count = max(1, len(whole) - len(head))
        if count >= self.max_prompt:
            raise ConfigError(f"a continuation of {count} tokens needs a session_len of {count + 2} at least")
        return _Scored(whole[-self.max_prompt :], count)

    def _windows(self, ids: Sequence[int]) -> Iterator[_Scored]:
        whole = [self.prefix_token_id, *ids]
        for done in range(1, len(whole), self.max_prompt - 1):
            end = min(done + self.max_prompt - 1, len(whole))
            yield _Scored(whole[max(0, end - self.max_prompt) : end], end - done)

    def _score(self, scored: Sequence[_Scored]) -> Iterator[list[TokenLogprob]]:
        """The tokens to be scored of each prompt."""
        params = SamplingParams(max_tokens=1, temperature=0.0, num_prompt_logprobs=0)
        for begin in range(0, len(scored), NUM_REQUESTS):
            part = scored[begin : begin + NUM_REQUESTS]
            completions = self.llm.generate([one.prompt for one in part], params)
            for one, completion in zip(part, completions, strict=True):
                assert completion.prompt_logprobs is not None
                yield [token for token in completion.prompt_logprobs[-one.num_scored :] if token is not None]


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """What a task asks for. Raises ConfigError for an option that the engine does not know."""
    known = {*OPTIONS, ENDS, *LENGTHS, SAMPLES}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(f"the task sets {unknown[0]}={options[unknown[0]]!r}; known are {', '.join(sorted(known))}")
    ends = options.get(ENDS) or ()
    lengths = [int(options[name]) for name in LENGTHS if options.get(name) is not None]
    chosen = {ours: options[name] for name, ours in OPTIONS.items() if options.get(name) is not None}
    if not options.get(SAMPLES, False):
        chosen["temperature"] = 0.0
    return SamplingParams(
        max_tokens=lengths[0] if lengths else MAX_GENERATED,
        stop=(ends,) if isinstance(ends, str) else tuple(end for end in ends if end),
        # What the checkpoint's generation_config adds is no part of a task.
        **{"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **chosen},
    )


def require_harness() -> None:
    """Raise ConfigError when lm_eval is not installed."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness cannot be imported ({error}): pip install lm-eval") from None


def harness_model(scorer: EngineScorer) -> Any:
    """The scorer as a model of the harness."""
    from lm_eval.api.model import LM

    class TritonmindLM(LM):
        """Requests of the harness carry their question in `args`."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return scorer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return scorer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return scorer.generate_until([request.args for request in requests])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return scorer.render(chat_history, add_generation_prompt=add_generation_prompt)

        @property
        def tokenizer_name(self) -> str:
            return re.sub(r"\W", "_", scorer.llm.model.model_name)

    return TritonmindLM()
