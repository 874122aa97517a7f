"""`tritonmind chat`: a model on this machine in the console, from a workspace or straight from a checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import queue
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tritonmind.errors import ConfigError, TritonmindError, UnavailableError
from tritonmind.sampling_params import SamplingParams
from tritonmind_tools import console
from tritonmind_tools.console_transport import Delta, Message, Status

if TYPE_CHECKING:
    from tritonmind.engine.llm import LLM, StreamDelta

# `tritonmind chat turbomind PATH` is how the tutorial spells it.
ENGINE_NAME = "turbomind"
DTYPES = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
# What a command line may say of the engine.
OVERRIDES = ("model_name", "chat_template", "session_len", "dtype", "device", "allow_pickle")

_EXAMPLES = """examples:
  tritonmind chat ./workspace                         talk; an empty line sends, /help says more
  tritonmind chat ./Llama-3.2-1B-Instruct             straight from a Hugging Face folder; nothing is written
  tritonmind chat model.gguf --device cpu             or from a GGUF file
  tritonmind chat ./workspace --session-len 2048 --temperature 0.7 --system 'Be brief.'
  echo 'Name three rivers.' | tritonmind chat ./workspace --temperature 0 > answer.txt

In a pipe each paragraph is a question, answers go to stdout and statistics to stderr.
"""


class LocalEngine:
    """An engine in a process of its own as the source of conversations. Thread-safe.

    One that has died is started again by the next answer. overrides: as LLM's. Raises TritonmindError with the cause
    when the engine cannot start.
    """

    def __init__(self, path: str, overrides: Mapping[str, object]) -> None:
        self._path = path
        self._overrides = dict(overrides)
        self._lock = threading.Lock()
        self._llm: LLM | None = self._start()
        info = self._llm.engine.info
        self._name = self._llm.model.model_name
        self._place = f"on {info.device} in {info.dtype}, {info.max_model_len} tokens of context"
        self.title = f"{self._name} {self._place}"

    def connect(self) -> LocalTransport:
        return LocalTransport(self)

    def status(self) -> Status:
        llm = self._llm
        if llm is None or not llm.engine.is_alive():
            return Status(is_ready=False, text="the engine has ended; the next question starts it again")
        stats = llm.engine.latest_stats
        load = f"{stats.num_running} answers running, {stats.num_waiting} waiting, " if stats is not None else ""
        return Status(is_ready=True, text=f"{self._name}, {load}{self._place}")

    def close(self) -> None:
        with self._lock:
            llm, self._llm = self._llm, None
        if llm is not None:
            llm.close()

    def llm(self) -> LLM:
        """The running engine, another one if that has died. Whoever asks while it starts waits."""
        with self._lock:
            if self._llm is not None and not self._llm.engine.is_alive():
                dead, self._llm = self._llm, None
                dead.close()
            if self._llm is None:
                self._llm = self._start()
            return self._llm

    def _start(self) -> LLM:
        from tritonmind.engine.llm import LLM

        llm = LLM(self._path, **self._overrides)  # type: ignore[arg-type]
        for warning in llm.warnings:
            print(f"tritonmind: warning: {warning}", file=sys.stderr)
        if llm.chat_template is None:
            llm.close()
            raise ConfigError(
                f"{self._path} has no chat template: it completes texts and cannot chat; "
                "use a model tuned for chat, or give its form with --chat-template"
            )
        return llm


class LocalTransport:
    """One conversation with a local engine."""

    def __init__(self, source: LocalEngine) -> None:
        self.title = source.title
        self._source = source
        self._events: queue.SimpleQueue[StreamDelta | Exception | None] = queue.SimpleQueue()

    def stream(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Generator[Delta, None, None]:
        params = SamplingParams(**options)
        llm = self._source.llm()
        events = self._events = queue.SimpleQueue()
        left = threading.Event()
        threading.Thread(target=_pump, args=(llm, messages, params, events, left), name="answer", daemon=True).start()
        try:
            while True:
                event = events.get()
                if event is None:
                    yield Delta(finish_reason="cancelled")
                    return
                if isinstance(event, Exception):
                    raise event
                yield Delta(
                    text=event.text,
                    token_ids=event.token_ids,
                    num_tokens=event.num_tokens,
                    num_input_tokens=event.num_prompt_tokens,
                    num_cached_tokens=event.num_cached_tokens,
                    finish_reason=event.finish_reason,
                    stop_reason=event.stop_reason,
                )
                if event.finish_reason is not None:
                    return
        except UnavailableError as error:
            if llm.engine.is_alive():
                raise
            raise UnavailableError(f"{error}; the next question starts the engine again") from None
        finally:
            left.set()

    def cancel(self) -> None:
        self._events.put(None)

    def close(self) -> None:
        """The engine is its source's."""


def _pump(
    llm: LLM,
    messages: Sequence[Message],
    params: SamplingParams,
    events: queue.SimpleQueue[StreamDelta | Exception | None],
    left: threading.Event,
) -> None:
    """Carry an answer to `events` until it ends or nobody waits any more, which cancels it."""
    try:
        with contextlib.closing(llm.stream_infer(messages, params)) as answer:
            for delta in answer:
                events.put(delta)
                if left.is_set():
                    return
    except TritonmindError as error:
        events.put(error)
    except Exception as error:
        events.put(TritonmindError(f"internal error: {type(error).__name__}: {error}"))
        raise


def register(subparsers: Any) -> None:
    """Add the command `chat`."""
    parser = subparsers.add_parser(
        "chat",
        help="chat with a model on this machine",
        description="Chat with a model in the terminal: a workspace, or a checkpoint as it stands.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        nargs="+",
        metavar="PATH",
        help="workspace, Hugging Face folder, .gguf file or ORGANISATION/NAME on the hub ('turbomind PATH' works too)",
    )
    add_engine_arguments(parser)
    console.add_arguments(parser)
    parser.set_defaults(run=run)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each of OVERRIDES."""
    parser.add_argument("--model-name", metavar="NAME", help="of a checkpoint: its name, as `convert` takes it")
    add_checkpoint_arguments(parser)
    parser.add_argument("--session-len", type=int, metavar="N", help="tokens of prompt and answer together")
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in; of a checkpoint also its weights' type")
    parser.add_argument("--device", choices=DEVICES, help="where to compute (default: a GPU if there is one)")


def add_checkpoint_arguments(parser: Any) -> None:
    """--chat-template and --allow-pickle, for a checkpoint that is served as it stands."""
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="of a checkpoint: chat template in Jinja or LMDeploy's JSON, or a name that `tritonmind list` prints",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", default=None, help="of a checkpoint: weights may be in pickle files"
    )


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends. Raises TritonmindError when the engine cannot start or an option is wrong."""
    overrides = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    # One conversation needs no more slots, and a GPU gets ready sooner.
    path = _path(args.path)
    source = partial(LocalEngine, path, {"max_num_seqs": 1, **overrides})
    return console.converse(source, args, opening=f"loading {path}")


def _path(words: Sequence[str]) -> str:
    *engine, path = words
    if engine not in ([], [ENGINE_NAME]):
        raise ConfigError(f"one PATH is expected, not {len(words)}: {' '.join(words)}")
    return path
