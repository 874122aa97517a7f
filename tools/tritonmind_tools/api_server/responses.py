"""POST /v1/responses: the answer of a chat as OpenAI's items, and the events that build them."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from tritonmind_tools.api_server.backends import Backend
from tritonmind_tools.api_server.chat import ChatAnswer
from tritonmind_tools.api_server.dialect import Dialect
from tritonmind_tools.api_server.errors import api_error
from tritonmind_tools.api_server.replies import EVENT_STREAM, Writer, encode_json, named_event
from tritonmind_tools.api_server.response_input import ResponsesBody, chat_body
from tritonmind_tools.api_server.tool_calls import Part, new_call_id
from tritonmind_tools.api_server.usage import Usage
from tritonmind_tools.console_transport import Delta

# Fields of a chat by the Responses API's names.
NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "prompt": "input", "response_format": "text.format"}


class Items:
    """The output in the making. Each method returns the events that tell of it: (type, fields)."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._kind = ""  # of the open item's part

    def add(self, part: Part) -> list[tuple[str, dict[str, Any]]]:
        if part.kind == "call":
            return [*self.close(), *self._open_call(part.text)]
        if part.kind == "arguments":
            self.output[-1]["arguments"] += part.text
            return [("response.function_call_arguments.delta", {**self._place(), "delta": part.text})]
        events = []
        if self._kind != part.kind:
            events += [*self.close(), *self._open_text(part.kind)]
        self.output[-1]["content"][0]["text"] += part.text
        delta = {**self._place(), "content_index": 0, "delta": part.text}
        if part.kind == "reasoning":
            return [*events, ("response.reasoning_text.delta", delta)]
        return [*events, ("response.output_text.delta", {**delta, "logprobs": []})]

    def close(self, status: str = "completed") -> list[tuple[str, dict[str, Any]]]:
        """End the open item, if there is one."""
        kind, self._kind = self._kind, ""
        if not kind:
            return []
        item, place = self.output[-1], self._place()
        item["status"] = status
        done = ("response.output_item.done", {"output_index": place["output_index"], "item": item})
        if kind == "call":
            arguments = {**place, "name": item["name"], "arguments": item["arguments"]}
            return [("response.function_call_arguments.done", arguments), done]
        part = item["content"][0]
        text = {**place, "content_index": 0, "text": part["text"]}
        name = "response.reasoning_text.done" if kind == "reasoning" else "response.output_text.done"
        if kind != "reasoning":
            text["logprobs"] = []
        return [(name, text), ("response.content_part.done", {**place, "content_index": 0, "part": part}), done]

    def _open_text(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        self._kind = kind
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item = {"id": f"rs_{secrets.token_hex(16)}", "type": "reasoning", "summary": [], "status": "in_progress"}
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": f"msg_{secrets.token_hex(16)}", "type": "message", "role": "assistant"}
            item["status"] = "in_progress"
        self.output.append({**item, "content": []})
        events = [("response.output_item.added", {"output_index": len(self.output) - 1, "item": dict(self.output[-1])})]
        self.output[-1]["content"] = [part]
        return [
            *events,
            ("response.content_part.added", {**self._place(), "content_index": 0, "part": dict(part)}),
        ]

    def _open_call(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        self._kind = "call"
        item = {"id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "call_id": new_call_id(), "name": name}
        self.output.append({**item, "arguments": "", "status": "in_progress"})
        return [("response.output_item.added", {"output_index": len(self.output) - 1, "item": dict(self.output[-1])})]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}


class ResponsesAnswer:
    """A request for a response, and how it is written. Raises ApiError."""

    def __init__(self, body: ResponsesBody, backend: Backend, dialect: Dialect) -> None:
        self._body = body
        self._backend = backend
        self._chat = ChatAnswer(chat_body(body), backend, dialect)
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._items = Items()
        self._usage = Usage()
        self._num_reasoning_tokens = 0
        self._num_events = 0

    @property
    def names(self) -> dict[str, str]:
        """As NAMES."""
        return {**self._chat.names, **NAMES}

    async def write(self, writer: Writer) -> None:
        """Answer, all at once or as events."""
        async with aclosing(self._backend.answer(self._chat.request)) as batches:
            await (self._stream if self._body.stream else self._collect)(batches, writer)

    async def _collect(self, batches: AsyncGenerator[list[Delta], None], writer: Writer) -> None:
        reason = "stop"
        async for batch in batches:
            for delta in batch:
                self._take(delta)
                reason = delta.finish_reason or reason
        self._items.close(_status(reason))
        await writer.whole(encode_json(self._response(_status(reason))))

    async def _stream(self, batches: AsyncGenerator[list[Delta], None], writer: Writer) -> None:
        reason = "stop"
        try:
            async for batch in batches:
                if writer.media_type is None:
                    await writer.begin(EVENT_STREAM)
                    begun = self._response("in_progress")
                    await writer.write(
                        self._event("response.created", {"response": begun})
                        + self._event("response.in_progress", {"response": begun})
                    )
                events = []
                for delta in batch:
                    events += self._take(delta)
                    reason = delta.finish_reason or reason
                await writer.write(b"".join([self._event(*each) for each in events]))
        except Exception as error:
            if writer.media_type is None:
                raise
            told = api_error(error, self.names)
            failed = self._response("failed", {"code": "server_error", "message": str(told)})
            await writer.end(self._event("response.failed", {"response": failed}))
            return
        closing = [self._event(*each) for each in self._items.close(_status(reason))]
        status = _status(reason)
        await writer.end(b"".join(closing) + self._event(f"response.{status}", {"response": self._response(status)}))

    def _take(self, delta: Delta) -> list[tuple[str, dict[str, Any]]]:
        self._usage.add([delta])
        parts = self._chat.choices[0].push(delta)
        if parts and all(part.kind == "reasoning" for part in parts):
            self._num_reasoning_tokens += delta.num_tokens
        return [each for part in parts for each in self._items.add(part)]

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        content = named_event(kind, {"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        return content

    def _response(self, status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        body, params = self._body, self._chat.request.params
        ended = status != "in_progress"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self._items.output if ended else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"parameters": None, "strict": None, **tool} for tool in body.tools or []],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._usage_body() if ended else None,
            "user": body.user,
        }

    def _usage_body(self) -> dict[str, Any]:
        usage = self._usage
        return {
            "input_tokens": usage.num_input_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": usage.num_input_tokens + usage.num_output_tokens,
        }


def _status(reason: str) -> str:
    return "incomplete" if reason == "length" else "completed"
