"""POST /v1/chat/completions: what a request asks for, and its answer in OpenAI's objects."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

from tritonmind.request_fields import ParsedRequest
from tritonmind_tools.api_server.backends import Backend
from tritonmind_tools.api_server.dialect import PROMPT, Dialect, described
from tritonmind_tools.api_server.errors import ApiError, refused, told
from tritonmind_tools.api_server.fields import invalid
from tritonmind_tools.api_server.logprobs import chat_logprobs
from tritonmind_tools.api_server.protocol import ChatBody
from tritonmind_tools.api_server.replies import DONE, EVENT_STREAM, Writer, encode_json, event
from tritonmind_tools.api_server.structured import guided, guided_call
from tritonmind_tools.api_server.tool_calls import (
    FORCED,
    FORMATS,
    Part,
    ReasoningParser,
    ToolCallParser,
    new_call_id,
)
from tritonmind_tools.api_server.usage import Usage
from tritonmind_tools.console_transport import Delta

# Fields of SamplingParams by OpenAI's names.
NAMES = {"num_logprobs": "top_logprobs", "include_stop": "include_stop_str_in_output", "prompt": "messages"}
# A forced call is held to a form that its client did not write.
_FORCED_NAMES = {"response_format": "tools"}


class Tools(NamedTuple):
    """What a request may call. offered: shown to the model. forced: one call must come. named: of this very tool."""

    offered: list[dict[str, Any]]
    forced: bool = False
    named: bool = False

    @property
    def names(self) -> set[str]:
        return {tool["function"]["name"] for tool in self.offered}


def chosen_tools(body: ChatBody) -> Tools:
    """What tools and tool_choice say. Raises ApiError."""
    tools, choice = body.tools or [], body.tool_choice
    if choice is None:
        choice = "auto" if tools else "none"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
            raise invalid("tool_choice.allowed_tools", 'must be {"mode": "auto", "tools": [...]}')
        wanted = [_tool_named(tools, _choice_name(each)) for each in allowed["tools"]]
        tools, choice = wanted, allowed.get("mode")
        if choice not in ("auto", "required"):
            raise invalid("tool_choice.allowed_tools.mode", "must be auto or required")
    if choice == "none":
        return Tools([])
    if choice not in ("auto", "required") and not isinstance(choice, dict):
        raise invalid("tool_choice", 'must be none, auto, required or {"type": "function", "function": {"name": ...}}')
    if not tools:
        raise invalid("tool_choice", "send tools to choose from")
    if isinstance(choice, dict):
        return Tools([_tool_named(tools, _choice_name(choice))], forced=True, named=True)
    return Tools(tools, forced=choice == "required")


def _choice_name(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid("tool_choice", 'must be none, auto, required or {"type": "function", "function": {"name": ...}}')
    return str(function["name"])


def _tool_named(tools: list[dict[str, Any]], name: str) -> dict[str, Any]:
    for tool in tools:
        if tool["function"]["name"] == name:
            return tool
    raise invalid("tool_choice", f"there is no tool {name[:64]!r} in tools")


class Choice:
    """One answer in the making: its text divided into what is said, thought and called."""

    def __init__(self, reasoning: ReasoningParser | None, calls: ToolCallParser | None) -> None:
        self.calls = calls
        self._reasoning = reasoning

    def push(self, delta: Delta) -> list[Part]:
        """What a delta adds."""
        if self._reasoning is None and self.calls is None:
            return [Part("content", delta.text)] if delta.text else []
        ended = delta.finish_reason is not None
        parts = [Part("content", delta.text)]
        if self._reasoning is not None:
            parts = self._reasoning.push(delta.text)
            if ended:
                parts += self._reasoning.finish()
        if self.calls is None:
            return [part for part in parts if part.text]
        found: list[Part] = []
        for part in parts:
            found += self.calls.push(part.text) if part.kind == "content" else [part]
        return found + self.calls.finish() if ended else found


class ChatAnswer:
    """A request for a conversation's next message, and how its answer is written. Raises ApiError.

    request: as the backend takes it. choices: the answers in the making.
    """

    def __init__(self, body: ChatBody, backend: Backend, dialect: Dialect) -> None:
        self._body = body
        self._backend = backend
        self._dialect = dialect
        self._tools = chosen_tools(body)
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options", "goes with stream=true")
        self.request = self._parsed()
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model,
        }
        thinks = dialect.has_reasoning and self.request.params.guided is None
        inside = thinks and dialect.starts_inside(self.request.template_variables)
        self.choices = [
            Choice(ReasoningParser(inside=inside) if thinks else None, self._call_parser())
            for _ in range(self.request.params.n)
        ]
        self._usage = Usage()

    @property
    def names(self) -> dict[str, str]:
        """As NAMES."""
        return NAMES | _FORCED_NAMES if self._tools.forced else NAMES

    async def write(self, writer: Writer) -> None:
        """Answer, all at once or as it comes."""
        async with aclosing(self._backend.answer(self.request)) as batches:
            await (self._stream if self._body.stream else self._collect)(batches, writer)

    async def _collect(self, batches: AsyncGenerator[list[Delta], None], writer: Writer) -> None:
        messages: list[dict[str, Any]] = [{"role": "assistant", "content": "", "refusal": None} for _ in self.choices]
        positions: list[list[dict[str, Any]]] = [[] for _ in self.choices]
        reasons = ["stop"] * len(self.choices)
        async for batch in batches:
            self._usage.add(batch)
            for delta in batch:
                for part in self.choices[delta.index].push(delta):
                    _add_part(messages[delta.index], part)
                if self._body.logprobs:
                    positions[delta.index] += self._logprobs(delta)
                reasons[delta.index] = self._finish_reason(delta) or reasons[delta.index]
        choices = []
        for index, message in enumerate(messages):
            if "tool_calls" in message and not message["content"]:
                message["content"] = None
            logprobs = {"content": positions[index], "refusal": None} if self._body.logprobs else None
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reasons[index]})
        await writer.whole(encode_json({**self._head, "choices": choices, "usage": self._usage.body()}))

    async def _stream(self, batches: AsyncGenerator[list[Delta], None], writer: Writer) -> None:
        begun: set[int] = set()
        async for batch in batches:
            if writer.media_type is None:
                await writer.begin(EVENT_STREAM)
            self._usage.add(batch)
            events = []
            for delta in batch:
                if delta.index not in begun:
                    begun.add(delta.index)
                    events.append(self._chunk(delta.index, {"role": "assistant", "content": "", "refusal": None}))
                events += self._chunks(delta)
            if events:
                await writer.write(b"".join(events))
        last = b""
        if self._include_usage:
            last = event({**self._head, "choices": [], "usage": self._usage.body()})
        await writer.end(last + DONE)

    def _chunks(self, delta: Delta) -> list[bytes]:
        """The events of a delta. Log-probabilities are those of all its tokens, with the first event."""
        logprobs: dict[str, Any] | None = None
        if self._body.logprobs and delta.logprobs:
            logprobs = {"content": self._logprobs(delta), "refusal": None}
        chunks = []
        parts = self.choices[delta.index].push(delta)
        for part in parts or ([Part("content", "")] if logprobs else []):
            chunks.append(self._chunk(delta.index, _delta_of(part), logprobs))
            logprobs = None
        reason = self._finish_reason(delta)
        if reason is not None:
            chunks.append(self._chunk(delta.index, {}, None, reason))
        return chunks

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        return chat_logprobs(delta, self._body.top_logprobs or 0, self._backend.model.tokenizer)

    def _finish_reason(self, delta: Delta) -> str | None:
        reason = "stop" if delta.finish_reason == "cancelled" else delta.finish_reason
        calls = self.choices[delta.index].calls
        if reason == "stop" and calls is not None and calls.num_calls and not self._tools.named:
            return "tool_calls"
        return reason

    def _call_parser(self) -> ToolCallParser | None:
        if not self._tools.offered:
            return None
        form = FORCED if self._tools.forced else FORMATS.get(self._dialect.tool_parser or "", FORMATS["hermes"])
        one = self._tools.forced or self._body.parallel_tool_calls is False
        return ToolCallParser(form, self._tools.names, max_calls=1 if one else None)

    def _parsed(self) -> ParsedRequest:
        body, tools = self._body, self._tools
        form = guided(body.response_format)
        if form is not None and tools.forced:
            raise invalid("tool_choice", "a call must come, or an answer by response_format: choose one")
        if tools.forced:
            with told(_FORCED_NAMES):
                form = guided_call(tools.offered)
        own: dict[str, Any] = {"guided": form}
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs", "goes with logprobs=true")
        if body.logprobs:
            own["num_logprobs"] = body.top_logprobs or 0
        max_tokens = _max_tokens(body)
        if max_tokens is not None:
            own["max_tokens"] = max_tokens
        messages, offered = self._conversation()
        format_of_calls = FORMATS.get(self._dialect.tool_parser or "")
        if offered and format_of_calls is not None and format_of_calls.has_special_tokens and not tools.forced:
            if body.skip_special_tokens:
                raise invalid("skip_special_tokens", "calls of this model are marked by special tokens: leave it out")
            own["skip_special_tokens"] = False
            body = body.model_copy(update={"skip_special_tokens": None})
        return ParsedRequest(
            messages=messages,
            tools=offered or None,
            template_variables=self._variables(),
            params=body.sampling_params(**own),
            stream=bool(body.stream),
            outputs=frozenset({"logprobs"} if body.logprobs else ()),
        )

    def _conversation(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Messages and tools for the template."""
        parser, offered = self._dialect.tool_parser, self._tools.offered
        messages = [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in self._body.messages
        ]
        if offered and parser is None:
            raise refused(
                "tools",
                "it is not known how this server's model calls tools: start it with --tool-call-parser "
                f"({', '.join(FORMATS)}; {PROMPT} describes them to any model)",
            )
        if parser == PROMPT and (offered or any(message["role"] == "tool" for message in messages)):
            return described(messages, offered), []
        return messages, offered

    def _variables(self) -> dict[str, Any] | None:
        """The template's, with reasoning_effort where it knows that."""
        variables, effort = self._body.chat_template_kwargs, self._body.reasoning_effort
        if effort is None:
            return variables
        known = self._dialect.template.variables if self._dialect.template is not None else set()
        if effort == "none" and "enable_thinking" in known:
            return {"enable_thinking": False, **(variables or {})}
        if "reasoning_effort" not in known:
            raise refused("reasoning_effort", "this model's chat template knows none")
        return {"reasoning_effort": effort, **(variables or {})}


def _max_tokens(body: ChatBody) -> int | None:
    if body.max_tokens is None or body.max_completion_tokens is None:
        return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens != body.max_completion_tokens:
        raise ApiError(
            400,
            f"max_tokens={body.max_tokens} and max_completion_tokens={body.max_completion_tokens} contradict: send one",
            param="max_completion_tokens",
            code="invalid_value",
        )
    return body.max_tokens


def _delta_of(part: Part) -> dict[str, Any]:
    """A part as a chunk's delta."""
    if part.kind == "content":
        return {"content": part.text}
    if part.kind == "reasoning":
        return {"reasoning_content": part.text}
    if part.kind == "call":
        function = {"name": part.text, "arguments": ""}
        call = {"index": part.call, "id": new_call_id(), "type": "function", "function": function}
        return {"tool_calls": [call]}
    return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}


def _add_part(message: dict[str, Any], part: Part) -> None:
    """A part into the message of an answer that comes whole."""
    if part.kind == "content":
        message["content"] += part.text
    elif part.kind == "reasoning":
        message["reasoning_content"] = message.get("reasoning_content", "") + part.text
    elif part.kind == "call":
        call = {"id": new_call_id(), "type": "function", "function": {"name": part.text, "arguments": ""}}
        message.setdefault("tool_calls", []).append(call)
    else:
        message["tool_calls"][part.call]["function"]["arguments"] += part.text
