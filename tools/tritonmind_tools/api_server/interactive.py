"""POST /v1/chat/interactive and /generate: LMDeploy's route, whose server remembers what was said in a session."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tritonmind.errors import NotFoundError
from tritonmind.request_fields import ParsedRequest, SessionFields
from tritonmind.sampling_params import SamplingParams
from tritonmind_tools.api_server.backends import Backend
from tritonmind_tools.api_server.fields import invalid
from tritonmind_tools.api_server.protocol import InteractiveBody, sampling_options
from tritonmind_tools.api_server.replies import JSON_LINES, Writer, encode_json
from tritonmind_tools.console_transport import Delta

NAMES = {"max_tokens": "request_output_len"}
NEW_SESSION = -1
DEFAULT_OUTPUT_LEN = 512  # LMDeploy's
MAX_SESSION_ID = 2**64 - 1
MAX_KNOWN_SESSIONS = 2**16
SESSION_HEADER = "x-session-id"


class KnownSessions:
    """Ids of sessions that were begun here: one of these that the model has forgotten is an error, not a new one."""

    def __init__(self) -> None:
        self._ids: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, session_id: int) -> bool:
        return session_id in self._ids

    def add(self, session_id: int) -> None:
        self._ids[session_id] = None
        self._ids.move_to_end(session_id)
        if len(self._ids) > MAX_KNOWN_SESSIONS:
            self._ids.popitem(last=False)

    def discard(self, session_id: int) -> None:
        self._ids.pop(session_id, None)


class InteractiveAnswer:
    """A turn of a session, or an order about it, and how its answer is written. Raises ApiError."""

    def __init__(self, body: InteractiveBody, backend: Backend, known: KnownSessions) -> None:
        self._body = body
        self._backend = backend
        self._known = known
        if not NEW_SESSION <= body.session_id <= MAX_SESSION_ID:
            raise invalid("session_id", f"must be {NEW_SESSION} (a new session) or 0 to {MAX_SESSION_ID}")
        is_new = body.session_id == NEW_SESSION
        self._is_end = not body.prompt and not body.stop and not body.interactive_mode
        if (body.stop or self._is_end) and is_new:
            raise invalid("session_id" if body.stop else "prompt", "say which session" if body.stop else "is empty")
        if body.prompt == [] and not body.stop and body.interactive_mode:
            raise invalid("prompt", "is empty: without interactive_mode that ends the session")
        self._session_id = secrets.randbits(53) if is_new else body.session_id
        self._is_start = is_new or body.renew_session
        self._params = SamplingParams(
            max_tokens=DEFAULT_OUTPUT_LEN if body.request_output_len is None else body.request_output_len,
            **sampling_options(body, "temperature", "top_p", "top_k", "repetition_penalty", "ignore_eos", "seed"),
        )

    async def write(self, writer: Writer) -> None:
        """One object, or as many lines of JSON as pieces come; `tokens` counts those so far."""
        async with aclosing(self._answer()) as batches:
            num_tokens = 0
            texts: list[str] = []
            headers = {SESSION_HEADER: str(self._session_id)}
            reason: str | None = None
            async for batch in batches:
                for delta in batch:
                    num_tokens += delta.num_tokens
                    reason = None if delta.finish_reason == "cancelled" else delta.finish_reason
                    texts.append(delta.text)
                if self._body.stream:
                    if writer.media_type is None:
                        await writer.begin(JSON_LINES, headers)
                    await writer.write(_object("".join(texts), num_tokens, reason) + b"\n")
                    texts.clear()
            if self._body.stream:
                await writer.end()
            else:
                await writer.whole(_object("".join(texts), num_tokens, reason), headers=headers)

    async def _answer(self) -> AsyncGenerator[list[Delta], None]:
        body, session_id = self._body, self._session_id
        if body.stop or self._is_end:
            async for _ in self._backend.answer(
                self._request(
                    SessionFields(
                        session_id=session_id, stop=body.stop, end=not body.interactive_mode and not body.stop
                    )
                )
            ):
                pass
            if self._is_end:
                self._known.discard(session_id)
            yield [Delta()]
            return
        ends = not body.interactive_mode
        fields = SessionFields(session_id=session_id, start=self._is_start, end=ends)
        try:
            async with aclosing(self._backend.answer(self._request(fields))) as batches:
                async for batch in batches:
                    self._remember(ends)
                    yield batch
            return
        except NotFoundError:
            if self._is_start or session_id in self._known:
                self._known.discard(session_id)
                raise
        # Nobody has heard of it: it begins with this turn.
        fields = SessionFields(session_id=session_id, start=True, end=ends)
        async with aclosing(self._backend.answer(self._request(fields))) as batches:
            async for batch in batches:
                self._remember(ends)
                yield batch

    def _remember(self, ends: bool) -> None:
        if ends:
            self._known.discard(self._session_id)
        else:
            self._known.add(self._session_id)

    def _request(self, session: SessionFields) -> ParsedRequest:
        is_order = self._body.stop or self._is_end
        return ParsedRequest(
            messages=None if is_order else self._body.prompt,
            session=session,
            params=self._params,
            stream=self._body.stream,
            outputs=frozenset(),
        )


def _object(text: str, num_tokens: int, reason: str | None) -> bytes:
    return encode_json({"text": text, "tokens": num_tokens, "finish_reason": reason})
