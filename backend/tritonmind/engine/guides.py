"""Requests whose answers are guided, until their grammars are compiled: no step waits for that."""

from __future__ import annotations

import contextlib
from collections.abc import Container
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import NamedTuple

from tritonmind.errors import InvalidRequestError, TritonmindError
from tritonmind.grammars import GrammarCompiler, Guide
from tritonmind.messages import EngineRequest
from tritonmind.model_source import ModelSource
from tritonmind.tokenizer import Tokenizer


class Compiled(NamedTuple):
    """A request that has its guide, or none and the reason why it gets none."""

    request: EngineRequest
    guide: Guide | None
    error: str = ""


class GuideQueue:
    """Guided requests in the order in which they came."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._compiler: GrammarCompiler | None = None
        self._waiting: list[tuple[EngineRequest, Future[Guide] | None, str]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def prepare(self) -> None:
        """Begin with what the first guided request would wait for; without the library there will be none."""
        with contextlib.suppress(TritonmindError):
            self._require().prepare()

    def add(self, request: EngineRequest) -> None:
        """Have the grammar of a request compiled."""
        assert request.guided is not None
        try:
            self._waiting.append((request, self._require().guide(request.guided), ""))
        except TritonmindError as error:
            self._waiting.append((request, None, str(error)))

    def remove(self, request_ids: Container[int]) -> list[EngineRequest]:
        """Those of these requests that wait here wait no longer."""
        removed = [request for request, _, _ in self._waiting if request.request_id in request_ids]
        self._waiting = [entry for entry in self._waiting if entry[0].request_id not in request_ids]
        return removed

    def take(self, timeout_s: float) -> list[Compiled]:
        """The requests that are through, in order; waits so long for the first one."""
        taken: list[Compiled] = []
        while self._waiting:
            request, future, error = self._waiting[0]
            guide = None
            if future is not None:
                try:
                    guide = future.result(0 if taken else timeout_s)
                except FutureTimeoutError:
                    break
                except InvalidRequestError as problem:
                    error = str(problem)
                except Exception as problem:
                    error = f"its grammar could not be compiled: {problem!r}"
            taken.append(Compiled(request, guide, error))
            del self._waiting[0]
        return taken

    def _require(self) -> GrammarCompiler:
        if self._compiler is None:
            model = self._source.model
            self._compiler = GrammarCompiler(
                Tokenizer.from_dir(self._source.tokenizer_dir),
                vocab_size=model.vocab_size,
                eos_token_ids=model.eos_token_ids,
            )
        return self._compiler
