"""How one request wants its tokens chosen, validated once for every front end.

A value of None means that the request left the field out: `resolve` fills it from the model's generation_config, else
from the neutral default, and clamps `max_tokens` to what the context has left.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tritonmind.errors import ConfigError, InvalidRequestError
from tritonmind.messages import MAX_LOGPROBS, EngineRequest, GuidedDecoding

MAX_STRINGS = 64  # of stop, and of bad_words
MAX_STRING_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_ANSWERS = 128  # as OpenAI's API
MAX_BIAS = 100
MAX_SEED = 2**64 - 1
MAX_OPENAI_PENALTY = 2
MAX_REPETITION_PENALTY = 100
MAX_TEMPERATURE = 1000
GENERATION_CONFIG_FILE = "generation_config.json"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling options of a request.

    max_tokens, min_tokens: tokens to generate at most and, before the answer may end by a token, at least.
    temperature: 0 is greedy. top_k: 0 keeps all. top_p: in (0, 1]. min_p: in [0, 1], drops tokens less likely than this
    share of the likeliest. repetition_penalty: 0.01 to 100, on tokens of prompt and answer (CTRL, Keskar et al. 2019).
    presence_penalty, frequency_penalty: -2 to 2, on tokens of the answer, once and each time (OpenAI's API).
    logit_bias: added to the logits of token ids, -100 to 100. bad_words: texts that must not come, also after a space.
    seed: unsigned 64 bit; the same seed gives the same text whatever else is in the batch.
    stop: strings that end the answer and are not part of it, unless include_stop. stop_token_ids: end the answer like
    eos does. ignore_eos: go on past eos. skip_special_tokens: special tokens have no text.
    n: answers to the same prompt; a seed is that of the first, the next ones count on from it.
    num_prompt_logprobs: log-probabilities of the prompt's tokens, as num_logprobs.
    num_logprobs: log-probabilities of the drawn token and of so many of the likeliest at each position; 0 is the first
    alone.
    guided: what the answer must be, as `tritonmind.guided.parse_response_format` reads it.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] = {}
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    guided: GuidedDecoding | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAX_ANSWERS:
            raise InvalidRequestError("n", self.n, f"must be 1 to {MAX_ANSWERS}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequestError("max_tokens", self.max_tokens, "must be at least 1")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise InvalidRequestError("min_tokens", self.min_tokens, "must be at least 0 and at most max_tokens")
        if self.temperature is not None and not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise InvalidRequestError(
                "temperature", self.temperature, f"must be 0 (the likeliest token) to {MAX_TEMPERATURE}"
            )
        if self.top_k is not None and self.top_k < 0:
            raise InvalidRequestError("top_k", self.top_k, "must be 0 (all tokens) or positive")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidRequestError("top_p", self.top_p, "must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InvalidRequestError("min_p", self.min_p, "must be at least 0 (keep all) and at most 1")
        if self.repetition_penalty is not None and not (
            1 / MAX_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY
        ):
            raise InvalidRequestError(
                "repetition_penalty",
                self.repetition_penalty,
                f"must be {1 / MAX_REPETITION_PENALTY} to {MAX_REPETITION_PENALTY} (1 is neutral)",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if value is not None and not abs(value) <= MAX_OPENAI_PENALTY:
                raise InvalidRequestError(
                    name, value, f"must be between -{MAX_OPENAI_PENALTY} and {MAX_OPENAI_PENALTY} (0 is neutral)"
                )
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequestError("seed", self.seed, "must fit an unsigned 64-bit integer")
        for name in ("stop", "bad_words"):
            _check_strings(name, getattr(self, name))
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                "stop_token_ids", f"{len(self.stop_token_ids)} ids", f"at most {MAX_STOP_TOKEN_IDS} are allowed"
            )
        for token_id in self.stop_token_ids:
            if token_id < 0:
                raise InvalidRequestError("stop_token_ids", token_id, "token ids are not negative")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidRequestError(
                "logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_LOGIT_BIASES} are allowed"
            )
        for token_id, bias in self.logit_bias.items():
            if token_id < 0 or not abs(bias) <= MAX_BIAS:
                raise InvalidRequestError(
                    "logit_bias", {token_id: bias}, f"maps token ids to numbers from -{MAX_BIAS} to {MAX_BIAS}"
                )
        for name in ("num_logprobs", "num_prompt_logprobs"):
            number = getattr(self, name)
            if number is not None and not 0 <= number <= MAX_LOGPROBS:
                raise InvalidRequestError(name, number, f"must be 0 to {MAX_LOGPROBS}")
        for name in ("ignore_eos", "min_tokens", "bad_words"):
            if self.guided is not None and getattr(self, name):
                raise InvalidRequestError(
                    name, getattr(self, name), "beside response_format, which may allow no other token: leave one out"
                )


def _check_strings(name: str, texts: tuple[str, ...]) -> None:
    if len(texts) > MAX_STRINGS:
        raise InvalidRequestError(name, f"{len(texts)} strings", f"at most {MAX_STRINGS} are allowed")
    for text in texts:
        if not text:
            raise InvalidRequestError(name, text, "a string must not be empty")
        if len(text) > MAX_STRING_LENGTH:
            raise InvalidRequestError(name, text, f"a string has at most {MAX_STRING_LENGTH} characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError(name, text, "has half a surrogate pair, which is no character") from None


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What the sampling options are when a request leaves them out. The values here are the neutral ones."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        SamplingParams(**{name: getattr(self, name) for name in self.__struct_fields__})

    @classmethod
    def from_dir(cls, tokenizer_dir: str | Path) -> GenerationDefaults:
        """From the checkpoint's generation_config.json, of which only these fields are read.

        The file is optional, and so is each field. Raises ConfigError naming the file and the field.
        """
        path = Path(tokenizer_dir) / GENERATION_CONFIG_FILE
        if not path.exists():
            return cls()
        try:
            config = msgspec.json.decode(path.read_bytes(), type=dict)
            given = {name: config[name] for name in cls.__struct_fields__ if config.get(name) is not None}
            return msgspec.convert(given, cls)
        except (OSError, msgspec.MsgspecError, InvalidRequestError) as error:
            raise ConfigError(f"{path}: {error}") from None


def resolve(
    params: SamplingParams,
    defaults: GenerationDefaults,
    *,
    request_id: int,
    prompt_token_ids: list[int],
    vocab_size: int,
    max_model_len: int,
    eos_token_ids: Sequence[int],
    encode_word: Callable[[str], list[list[int]]],
    check_guided: Callable[[GuidedDecoding], None] | None = None,
) -> EngineRequest:
    """Settle every option that the request left open and check what depends on the model.

    max_tokens becomes at most what the context of max_model_len tokens has left after the prompt. A request without a
    seed gets a random one. encode_word: the runs of token ids that a bad word may be written as. check_guided: raises
    InvalidRequestError unless answers can be held to it; as GrammarCompiler.check. Raises
    InvalidRequestError for a prompt that is empty, too long or has ids outside the vocabulary.
    """
    length = len(prompt_token_ids)
    if not length:
        raise InvalidRequestError("prompt", "", "is empty: send at least one token")
    if length >= max_model_len:
        raise InvalidRequestError(
            "prompt",
            f"{length} tokens",
            f"session_len is {max_model_len} and the answer needs at least one: send up to {max_model_len - 1}",
        )
    for name, ids in (
        ("input_ids", prompt_token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias),
    ):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(name, token_id, f"token ids are 0 to {vocab_size - 1}")
    for name in ("num_logprobs", "num_prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise InvalidRequestError(name, getattr(params, name), f"the vocabulary has {vocab_size} tokens")
    if params.guided is not None:
        if check_guided is None:
            raise InvalidRequestError("response_format", params.guided.kind, "is not available here: leave it out")
        check_guided(params.guided)
    left = max_model_len - length
    max_tokens = left if params.max_tokens is None else min(params.max_tokens, left)
    stop_token_ids = set(params.stop_token_ids)
    if not params.ignore_eos:
        stop_token_ids.update(eos_token_ids)
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        max_tokens=max_tokens,
        temperature=defaults.temperature if params.temperature is None else params.temperature,
        top_k=min(defaults.top_k if params.top_k is None else params.top_k, vocab_size),
        top_p=defaults.top_p if params.top_p is None else params.top_p,
        min_p=defaults.min_p if params.min_p is None else params.min_p,
        repetition_penalty=(
            defaults.repetition_penalty if params.repetition_penalty is None else params.repetition_penalty
        ),
        presence_penalty=params.presence_penalty or 0.0,
        frequency_penalty=params.frequency_penalty or 0.0,
        seed=secrets.randbits(64) if params.seed is None else params.seed,
        stop_token_ids=sorted(stop_token_ids),
        min_tokens=min(params.min_tokens, max_tokens),
        logit_bias=list(params.logit_bias.items()),
        # A tokenizer may have tokens that the model has not: no answer holds them, and they have no logit to forbid.
        bad_words=[run for word in params.bad_words for run in encode_word(word) if max(run) < vocab_size],
        num_prompt_logprobs=params.num_prompt_logprobs,
        num_logprobs=params.num_logprobs,
        guided=params.guided,
    )


def siblings(first: EngineRequest, num_answers: int) -> list[EngineRequest]:
    """`first` and the requests for the other answers to its prompt: the next ids and seeds; they wait for its K, V."""
    others = [
        msgspec.structs.replace(
            first,
            request_id=first.request_id + number,
            seed=(first.seed + number) & MAX_SEED,
            parent_id=first.request_id,
            num_prompt_logprobs=None,
        )
        for number in range(1, num_answers)
    ]
    return [first, *others]
