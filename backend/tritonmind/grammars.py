"""Grammars that answers are held to: compiled by llguidance, an optional dependency, over our tokenizer's bytes.

A front end compiles to see whether there is such an answer, an engine for use. Both do it in one thread of their own: a
compilation takes milliseconds, some take a second, and neither intake nor steps wait for another's.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import msgspec

from tritonmind.errors import InvalidRequestError, UnavailableError
from tritonmind.guided import FIELD
from tritonmind.messages import GuidedDecoding
from tritonmind.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

P = ParamSpec("P")
T = TypeVar("T")

EXTRA = "guided"
MAX_REASON_LENGTH = 300
NO_TEXT = "no text is like that"
MAX_CACHED = 32  # compiled grammars, of up to some 40 MB each, mostly far below one
COMPILE_TIMEOUT_S = 30.0
# The compiler recurses along the references of a schema: of the longest allowed one it needs more than a usual stack,
# and an overflow ends the process.
STACK_BYTES = 256 << 20
# Bounds of what one mask may cost: 50 000 units of the lexer's fuel are about 4 ms. Beyond, the request fails.
STEP_LEXER_FUEL = 50_000
STEP_MAX_ITEMS = 20_000
# Bound of what one answer may take, some 50 MB: an expression that counts needs a few dozen for each token.
MAX_LEXER_STATES = 100_000
# Of {n} in an expression: fuel does not bound what a million repetitions of a character cost a step.
MAX_REPETITIONS = 10_000
# Text that a grammar leaves no choice about is drawn token by token like any other: to look ahead and tokenise it, as
# the library would, costs each step more, the longer it is.
NO_FORCING = '%llguidance {"no_forcing": true}\n'
# Between the tokens of JSON: bounded, so that a model that is fond of spaces comes to an end.
WHITESPACE = r"[ \n\r\t]{1,64}"

_POSITION = re.compile(r"^at (\d+)\(\d+\): ")
_LISTING = re.compile(r"\s*\d+ \|")
_REPETITION = re.compile(r"\{(\d*),?(\d*)\}")


def missing_extra() -> InvalidRequestError:
    """Why a request for structured output is refused where the library is not installed."""
    return InvalidRequestError(FIELD, "", f"structured output needs llguidance: pip install tritonmind[{EXTRA}]")


def token_table(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes that each id of a model with `vocab_size` ids adds to a text; none for those without a token."""
    return [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]


class Guide:
    """Which tokens one answer may go on with. Belongs to the engine's thread.

    error: why it can say nothing more, a limit of the library's.
    """

    __slots__ = ("error", "matcher", "num_taken")

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.num_taken = 0
        self.error: str | None = None

    def take(self, token_ids: Sequence[int]) -> None:
        """Advance over the answer's next tokens."""
        self.num_taken += len(token_ids)
        if self.error is None and not self.matcher.consume_tokens(list(token_ids)):
            self._fail()

    def write_mask(self, address: int, num_bytes: int) -> None:
        """Write a bit for each token of the model, 1 if it is allowed. Means nothing once there is an error."""
        if self.error is None:
            self.matcher.unsafe_compute_mask_ptr(address, num_bytes)
            if self.matcher.is_error():
                self._fail()

    def _fail(self) -> None:
        self.error = f"{FIELD}: the grammar cannot be followed any further: {_reason(self.matcher)}"


class GrammarCompiler:
    """Compiles what requests ask for, over the vocabulary of one model. Thread-safe; what is used again is kept."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        self._library: LLTokenizer | None = None
        self._kept: OrderedDict[GuidedDecoding, LLMatcher | str] = OrderedDict()  # or why there is none
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._starting = threading.Lock()
        self._is_started = False

    def prepare(self) -> None:
        """Begin with what all grammars need, about half a second for 128 000 tokens. InvalidRequestError as `guide`."""
        self._require()
        self._submit(self._vocabulary)

    def check(self, guided: GuidedDecoding) -> None:
        """Raise InvalidRequestError, saying why, unless answers can be held to `guided`. At once if that is known."""
        known = self._kept.get(guided)
        if isinstance(known, str):
            raise _refusal(guided, known)
        if known is not None:
            return
        future = self.guide(guided)
        try:
            future.result(COMPILE_TIMEOUT_S)
        except FutureTimeoutError:
            future.cancel()
            raise _refusal(
                guided, f"takes longer than {COMPILE_TIMEOUT_S:g} s to compile, itself or what is before it"
            ) from None

    def guide(self, guided: GuidedDecoding) -> Future[Guide]:
        """A guide for one answer, as soon as it is compiled; its exception is an InvalidRequestError."""
        self._require()
        return self._submit(self._guide, guided)

    def close(self) -> None:
        """Compile nothing more; what waits is cancelled."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _require(self) -> None:
        try:
            import llguidance  # noqa: F401
        except ImportError:
            raise missing_extra() from None
        if not self._eos_token_ids:
            raise InvalidRequestError(FIELD, "", "the model has no eos token to end such an answer with")
        if self._tokenizer.vocabulary.decoding.separator:
            raise InvalidRequestError(FIELD, "", "the tokenizer puts text between tokens, which no grammar sees")

    def _submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            with self._starting:
                if self._is_started:
                    return self._worker.submit(function, *args, **kwargs)
                self._is_started = True
                usual = threading.stack_size(STACK_BYTES)
                try:
                    return self._worker.submit(function, *args, **kwargs)  # starts the thread
                finally:
                    threading.stack_size(usual)
        except RuntimeError as error:
            raise UnavailableError(f"no grammar is compiled any more: {error}") from None

    def _guide(self, guided: GuidedDecoding) -> Guide:
        compiled = self._kept.get(guided)
        if compiled is None:
            compiled = self._kept[guided] = self._compile(guided)
            if len(self._kept) > MAX_CACHED:
                self._kept.popitem(last=False)
        self._kept.move_to_end(guided)
        if isinstance(compiled, str):
            raise _refusal(guided, compiled)
        return Guide(compiled.deep_copy())

    def _compile(self, guided: GuidedDecoding) -> LLMatcher | str:
        """The matcher, with the first mask, which costs more than later ones; or why there is none."""
        from llguidance import LLMatcher, LLParserLimits

        for counts in _REPETITION.findall(guided.spec):
            if any(len(count) > 9 or int(count or 0) > MAX_REPETITIONS for count in counts):
                return f"repeats something more than {MAX_REPETITIONS} times: ask for fewer, or for any number"
        limits = LLParserLimits(
            step_lexer_fuel=STEP_LEXER_FUEL,
            step_max_items=STEP_MAX_ITEMS,
            max_lexer_states=MAX_LEXER_STATES,
            verbose_errors=False,
        )
        try:
            matcher = LLMatcher(self._vocabulary(), self._grammar(guided), log_level=0, limits=limits)
            allowed = not matcher.is_error() and any(matcher.compute_bitmask())
        except BaseException as error:  # a panic of the library is no Exception
            return f"the compiler failed: {error!r}"
        if matcher.is_error():
            return _reason(matcher, names_lines=guided.kind == "grammar")
        return matcher if allowed else NO_TEXT

    def _grammar(self, guided: GuidedDecoding) -> str:
        from llguidance import LLMatcher, regex_to_lark

        match guided.kind:
            case "regex":
                expression = regex_to_lark(guided.spec, use_ascii="d")
                rules = f"start: /{expression}/" if expression else 'start: ""'
            case "grammar":
                rules = guided.spec
            case "json_object" | "json_schema":
                schema = msgspec.json.decode(guided.spec or '{"type": "object"}')
                options = schema.get("x-guidance", {"whitespace_pattern": WHITESPACE})
                # Some tokenizers have a space in the token of a first word; answers to messages lose it.
                start = 'start: " "? json\n' if self._tokenizer.vocabulary.decoding.strip else "start: json\n"
                rules = f"{start}json: %json {msgspec.json.encode({**schema, 'x-guidance': options}).decode()}"
        return LLMatcher.grammar_from_lark(NO_FORCING + rules)

    def _vocabulary(self) -> LLTokenizer:
        if self._library is None:
            from llguidance import LLTokenizer, TokenizerWrapper

            source = _LibraryTokenizer(self._tokenizer, self._vocab_size, self._eos_token_ids)
            self._library = source.library = LLTokenizer(
                TokenizerWrapper(source), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        return self._library


class _LibraryTokenizer:
    """Our tokenizer as llguidance asks for one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        self.library: LLTokenizer | None = None
        self.tokens = token_table(tokenizer, vocab_size)
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None
        special = {token_id for token_id in tokenizer.special_token_ids if token_id < vocab_size}
        self.special_token_ids = sorted(special.union(eos_token_ids))

    def __call__(self, text: bytes) -> list[int]:
        """Token ids of a text, any of which it is made; asked for only by a grammar that undoes NO_FORCING."""
        return [] if self.library is None else self.library.greedy_tokenize(text.decode())


def _refusal(guided: GuidedDecoding, reason: str) -> InvalidRequestError:
    return InvalidRequestError(FIELD, guided.spec or guided.kind, reason)


def _reason(matcher: LLMatcher, *, names_lines: bool = False) -> str:
    """What the library says is wrong, without the listing and the states of its own behind it."""
    text = matcher.get_error().replace("failed to compile JSON schema: ", "")
    if text.startswith("NoExtension"):
        return NO_TEXT
    lines = list(itertools.takewhile(lambda line: not _LISTING.match(line), text.splitlines()))
    text = " ".join(line.strip() for line in lines if line.strip(" ^") and not line.startswith("<"))
    text = _POSITION.sub(lambda found: f"line {int(found[1]) - 1}: " if names_lines else "", text)
    return text if len(text) <= MAX_REASON_LENGTH else text[: MAX_REASON_LENGTH - 3] + "..."
