"""The threads that answer: tokens of a request in, responses to its client out.

A lane is one thread's queue of requests to look at; a request stays on its own, so its responses keep their order. A
request's session is free again before its last response leaves.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from tritonmind.errors import CancelledError, TritonmindError, UnavailableError
from tritonmind.live_request import Answer, Choice, Lane, LiveRequest, Responder
from tritonmind.messages import TokenLogprob, TokenOutput
from tritonmind.metrics import Metrics, reason_of
from tritonmind.sessions import SessionStore
from tritonmind.text_stream import TextDelta
from tritonmind.tokenizer import Tokenizer

NUM_LANES = 4
NUM_FINISH_ATTEMPTS = 3
FINISH_RETRY_DELAY_S = 0.05

log = logging.getLogger("tritonmind")


class Senders:
    """All lanes. on_end: called once a request, with whether its last response could be sent."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sessions: SessionStore,
        metrics: Metrics,
        on_end: Callable[[LiveRequest, bool], None],
        num_lanes: int = NUM_LANES,
    ) -> None:
        self._decoded = functools.lru_cache(maxsize=None)(  # at most the vocabulary
            lambda token_id: tokenizer.token_bytes(token_id).decode(errors="replace")
        )
        self._sessions = sessions
        self._metrics = metrics
        self._on_end = on_end
        self._lanes: list[Lane] = [queue.SimpleQueue() for _ in range(num_lanes)]
        self._threads = [
            threading.Thread(target=self._run_lane, args=(lane,), name=f"sender-{i}", daemon=True)
            for i, lane in enumerate(self._lanes)
        ]
        for thread in self._threads:
            thread.start()

    def lane(self, number: int) -> Lane:
        """The lane of the number-th request."""
        return self._lanes[number % len(self._lanes)]

    def close(self) -> None:
        """End the threads, after what they have been asked to look at."""
        for lane in self._lanes:
            lane.put(None)
        for thread in self._threads:
            thread.join()

    def _run_lane(self, lane: Lane) -> None:
        while (live := lane.get()) is not None:
            # Before the inbox is read: what arrives from now on rings again.
            live.rung = False
            if live.closed:
                continue
            try:
                self._advance(live)
            except Exception as error:
                log.exception("a response could not be made or sent")
                live.abort()
                self._end(live, TritonmindError(f"internal error: {error!r}"))

    def _advance(self, live: LiveRequest) -> None:
        """One response with everything that is pending, if there is something to say."""
        if live.failure is not None:
            self._end(live, live.failure)
            return
        for output in _drain(live.inbox):
            choice = live.choice(output.request_id)
            answer = choice.answer
            if answer.finish_reason is not None:
                continue
            if output.finish_reason == "error":
                self._end(live, UnavailableError(output.error or "the engine failed"))
                return
            if output.finish_reason == "cancelled" and not live.interrupted:
                self._end(live, CancelledError("the request was cancelled"))
                return
            delta = _take(live, choice, output)
            answer.text += delta.text
            answer.token_ids += delta.token_ids
            answer.num_output_tokens += delta.num_tokens
            self._add_logprobs(live, answer, delta, output)
            answer.num_cached_tokens = max(answer.num_cached_tokens, output.num_cached_tokens)
            answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
            if delta.finish_reason is not None and output.finish_reason is None:
                live.abort_choices([choice])  # a stop string: the engine does not know
        answers = [choice.answer for choice in live.choices]
        if None not in [answer.finish_reason for answer in answers]:
            self._close_turn(live)
            self._metrics.count("generated_tokens", sum([answer.num_output_tokens for answer in answers]))
            live.responder.send(answers, final=True)
            self._end(live, None)
        elif live.request.stream and any(answer.text and answer.num_output_tokens for answer in answers):
            for choice in live.choices:
                choice.answer = choice.answer.rest()
            self._metrics.count("generated_tokens", sum([answer.num_output_tokens for answer in answers]))
            live.responder.send(answers, final=False)

    def _add_logprobs(self, live: LiveRequest, answer: Answer, delta: TextDelta, output: TokenOutput) -> None:
        if output.prompt_logprobs is not None:
            answer.prompt_logprobs = [
                None if logprob is None else self._position(token_id, logprob)
                for token_id, logprob in zip(live.prompt_token_ids, output.prompt_logprobs, strict=True)
            ]
        if delta.logprobs is not None:
            for token_id, logprob in zip(delta.token_ids, delta.logprobs, strict=True):
                answer.logprobs.append(self._position(token_id, logprob))
                answer.cumulative_logprob += logprob.logprob

    def _position(self, token_id: int, logprob: TokenLogprob) -> dict[str, dict[str, Any]]:
        """A token's log-probabilities as vLLM's backend writes them: {id: {logprob, rank, decoded_token}}."""
        ranked = [(other, value, rank) for rank, (other, value) in enumerate(logprob.top, start=1)]
        if all(other != token_id for other, _, _ in ranked):
            ranked.append((token_id, logprob.logprob, logprob.rank))
        return {
            str(other): {
                "logprob": value,
                "rank": rank,
                "decoded_token": self._decoded(other),
            }
            for other, value, rank in ranked
        }

    def _end(self, live: LiveRequest, error: TritonmindError | None) -> None:
        """Account for the last response, sending it if it is an error."""
        live.closed = True
        self._close_turn(live)
        sent = error is None or _send_error(live.responder, error)
        self._on_end(live, sent)
        self._record(live, error)

    def _close_turn(self, live: LiveRequest) -> None:
        """Free the request's session, with all tokens in its history that came."""
        turn, live.turn = live.turn, None
        if turn is None:
            return
        try:
            (choice,) = live.choices  # a turn has one answer
            while live.inbox and choice.stream is not None and not choice.stream.finished:
                _take(live, choice, live.inbox.popleft())
        except Exception:
            log.exception("the last tokens of a turn are lost to its session")
        self._sessions.end(
            turn,
            live.request.messages,
            live.prompt_token_ids,
            live.answer_token_ids,
            ended_by_token=live.ended_by_token,
        )

    def _record(self, live: LiveRequest, error: TritonmindError | None) -> None:
        """Count an ended request, unless it was an order that worked."""
        if error is None and live.request.is_order:
            return
        reason = reason_of(error) if error is not None else str(live.answer.finish_reason)
        self._metrics.count("requests_finished", value=reason)
        if live.num_tokens:
            self._metrics.count("prompt_tokens", live.answer.num_input_tokens)
            self._metrics.count("prefix_cache_hit_tokens", live.answer.num_cached_tokens)
        self._metrics.observe(live.times(complete=reason in ("stop", "length")))


def _send_error(responder: Responder, error: TritonmindError) -> bool:
    """End a request with `error`, or else just end it. Whether either worked."""
    try:
        responder.fail(error)
        return True
    except Exception:
        log.exception("the last response of a request could not be sent; ending it without: %s", error)
    for _ in range(NUM_FINISH_ATTEMPTS):
        try:
            responder.finish()
            return True
        except Exception as cause:
            log.error("a request could not be ended: %r", cause)
            time.sleep(FINISH_RETRY_DELAY_S)
    return False


def _drain(inbox: deque[TokenOutput]) -> list[TokenOutput]:
    """Everything that is pending, the tokens of several steps for one answer as if they were of one.

    What ends an answer early stays apart from the tokens before, which belong to the session's history all the same.
    """
    pending: dict[int, list[TokenOutput]] = {}
    ends = []
    while inbox:
        output = inbox.popleft()
        if output.finish_reason in ("error", "cancelled"):
            ends.append(output)
        else:
            pending.setdefault(output.request_id, []).append(output)
    return [*(outputs[0] if len(outputs) == 1 else _joined(outputs) for outputs in pending.values()), *ends]


def _joined(outputs: list[TokenOutput]) -> TokenOutput:
    """Consecutive outputs of one answer as one. Only the last of them can end it, only the first has the prompt's."""
    with_logprobs = outputs[0].logprobs is not None
    return msgspec.structs.replace(
        outputs[-1],
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        logprobs=[logprob for output in outputs for logprob in output.logprobs or ()] if with_logprobs else None,
        prompt_logprobs=outputs[0].prompt_logprobs,
        num_cached_tokens=max(output.num_cached_tokens for output in outputs),
    )


def _take(live: LiveRequest, choice: Choice, output: TokenOutput) -> TextDelta:
    """An output's text, and its tokens for the session's history."""
    assert choice.stream is not None
    delta = choice.stream.push(
        output.token_ids, output.finish_reason, stop_token_id=output.stop_token_id, logprobs=output.logprobs
    )
    if live.request.session is not None:
        live.answer_token_ids += delta.token_ids
        live.ended_by_token = output.stop_token_id is not None and len(delta.token_ids) == len(output.token_ids)
    return delta
