"""Conversations that the server remembers: the token ids of each session, so that a request brings its new turn only.

A session is what its turns were made of, either chat messages or raw text and ids. Its history is exactly the token ids
that the engine saw and made: a next turn adds to them and never encodes them again, so that the engine's prefix cache
finds all of them. A turn counts once it has a token: a turn that ends without one, for whatever reason, leaves the
history as it was, and one that ends early, stopped, cancelled or failed, keeps the tokens that it got.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tritonmind.chat_template import Message
from tritonmind.errors import BusyError, InvalidRequestError, NotFoundError, UnavailableError
from tritonmind.request_fields import SessionFields

DEFAULT_MAX_SESSIONS = 4096
DEFAULT_MAX_SESSION_TOKENS = 2**24  # 64 MiB of token ids


@dataclass(frozen=True)
class ChatTurn:
    """Messages and the answer to them. Its answer lies at [num_prompt_tokens, num_tokens) of the history.

    ended_by_token: the answer's last token is the one that ended it; a template writes its own in its place.
    """

    messages: tuple[Message, ...]
    num_prompt_tokens: int
    num_tokens: int
    ended_by_token: bool


class Session:
    """History of one session and the turn in the making, if there is one."""

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.token_ids = array("i")
        self.turns: list[ChatTurn] = []  # empty for a session of raw text
        self.turn: Turn | None = None
        self.forgotten = False  # is dropped when its turn ends


class Turn:
    """A turn in the making: the session, of which the first `length` tokens are the history it goes on from."""

    def __init__(self, session: Session, length: int, ends: bool) -> None:
        self.session = session
        self.length = length
        self.ends = ends

    @property
    def history(self) -> list[int]:
        return self.session.token_ids[: self.length].tolist()

    def text_history(self, field: str) -> list[int]:
        """The token ids that raw text or ids follow. InvalidRequestError if the history is chat messages."""
        if self.length and self.session.turns:
            expected = f"this session is one of messages: {field} cannot follow them"
            raise InvalidRequestError("session_id", self.session.session_id, expected)
        return self.history

    def chat_turns(self) -> list[ChatTurn]:
        """The turns that messages follow, the last one perhaps cut short. InvalidRequestError for other histories."""
        if not self.length:
            return []
        if not self.session.turns:
            expected = "this session is one of raw text: messages cannot follow it, send text_input or input_ids"
            raise InvalidRequestError("session_id", self.session.session_id, expected)
        kept = [turn for turn in self.session.turns if turn.num_prompt_tokens <= self.length]
        end = kept[-1].num_tokens if kept else 0
        if self.length > end:
            prompt_end = self.session.turns[len(kept)].num_prompt_tokens
            raise InvalidRequestError(
                "step",
                self.length,
                f"is inside a turn's prompt, which messages cannot follow: rewind to {end}, where the turn before it "
                f"ends, or to {prompt_end}, where its answer begins",
            )
        if self.length < end:
            kept[-1] = replace(kept[-1], num_tokens=self.length, ended_by_token=False)
        return kept


class SessionStore:
    """All sessions, at most max_sessions of them and max_tokens in their histories: the least recently used go first.

    Thread-safe. A session at work is never dropped, and takes one request at a time.
    """

    def __init__(self, max_sessions: int, max_tokens: int) -> None:
        self._max_sessions = max_sessions
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._sessions: OrderedDict[int, Session] = OrderedDict()  # least recently used first
        self._num_tokens = 0

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def begin(self, fields: SessionFields) -> Turn:
        """Reserve a session for a turn, until `end`.

        NotFoundError for a session that is unknown or was dropped, BusyError for one at work,
        InvalidRequestError for a step beyond its history.
        """
        with self._lock:
            session = self._sessions.get(fields.session_id)
            if session is not None:
                self._check_idle(session)
            if fields.start:
                if session is not None:
                    self._drop(session)
                session = self._create(fields.session_id)
            if session is None:
                raise _expired(fields.session_id)
            length = len(session.token_ids)
            if fields.step is not None:
                if fields.step > length:
                    raise InvalidRequestError(
                        "step", fields.step, f"session {fields.session_id} has {length} tokens of history"
                    )
                length = fields.step
            session.turn = Turn(session, length, fields.end)
            return session.turn

    def end(
        self,
        turn: Turn,
        messages: Sequence[Message] | None,
        prompt_token_ids: Sequence[int],
        answer_token_ids: Sequence[int],
        *,
        ended_by_token: bool,
    ) -> None:
        """Free the turn's session. If the turn has tokens, they are its history now, or it is forgotten if it ends."""
        with self._lock:
            session = turn.session
            session.turn = None
            if answer_token_ids:
                turns = [] if messages is None else turn.chat_turns()
                self._num_tokens -= len(session.token_ids)
                session.token_ids = array("i", prompt_token_ids)
                session.token_ids.extend(answer_token_ids)
                self._num_tokens += len(session.token_ids)
                if messages is not None:
                    turns.append(
                        ChatTurn(tuple(messages), len(prompt_token_ids), len(session.token_ids), ended_by_token)
                    )
                session.turns = turns
            if session.forgotten or (turn.ends and answer_token_ids):
                self._drop(session)
            else:
                self._sessions.move_to_end(session.session_id)
            self._evict()

    def forget(self, session_id: int) -> None:
        """Drop a session. NotFoundError for an unknown one, BusyError for one at work."""
        with self._lock:
            session = self._require(session_id)
            self._check_idle(session)
            self._drop(session)

    def stop(self, session_id: int, *, forget: bool) -> Turn | None:
        """The turn at work on a session, to be interrupted. NotFoundError for an unknown session.

        forget: drop the session, as soon as no turn is at work on it.
        """
        with self._lock:
            session = self._require(session_id)
            if forget and session.turn is None:
                self._drop(session)
            else:
                session.forgotten = forget or session.forgotten
            return session.turn

    def _require(self, session_id: int) -> Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise _expired(session_id)
        return session

    def _check_idle(self, session: Session) -> None:
        if session.turn is not None:
            raise BusyError(
                f"session {session.session_id} is busy with another request: wait for its answer, or interrupt it with "
                "session_stop"
            )

    def _create(self, session_id: int) -> Session:
        if len(self._sessions) >= self._max_sessions and not self._evict_one():
            raise UnavailableError(
                f"all sessions are at work: {len(self._sessions)} of max_sessions={self._max_sessions}; try again later"
            )
        session = self._sessions[session_id] = Session(session_id)
        return session

    def _evict(self) -> None:
        """A session alone may be longer than all together, so that there is always one."""
        while self._num_tokens > self._max_tokens and len(self._sessions) > 1 and self._evict_one():
            pass

    def _evict_one(self) -> bool:
        for session in self._sessions.values():
            if session.turn is None:
                self._drop(session)
                return True
        return False

    def _drop(self, session: Session) -> None:
        self._num_tokens -= len(session.token_ids)
        del self._sessions[session.session_id]


def _expired(session_id: int) -> NotFoundError:
    return NotFoundError(
        f"session expired: session_id={session_id} is unknown, or was dropped to make room; begin it with "
        "sequence_start and the whole conversation"
    )
