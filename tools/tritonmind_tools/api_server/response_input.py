"""Bodies of the Responses API, and what they ask for in the words of a chat."""

from __future__ import annotations

from typing import Any, get_args

from tritonmind_tools.api_server.errors import refused
from tritonmind_tools.api_server.fields import MAX_MESSAGES, Json, Variables, checked_text, invalid, lacking
from tritonmind_tools.api_server.protocol import Body, ChatBody, Effort, Text

# What an item of each type may have, beside labels without an effect.
_LABELS = {"id", "status", "phase"}
_ITEM_KEYS = {
    "message": {"role", "content"},
    "reasoning": {"content", "summary"},
    "function_call": {"call_id", "name", "arguments"},
    "function_call_output": {"call_id", "output"},
}
_STORED = "answers are not stored: send the whole conversation as input"


class ResponsesBody(Body):
    """POST /v1/responses."""

    model: Text
    input: Json
    instructions: Text | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: Json = None
    tool_choice: Json = None
    parallel_tool_calls: bool | None = None
    text: Json = None
    reasoning: Json = None
    metadata: dict[Text, Text] | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    # Ours.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: Variables = None
    # Not served.
    store: lacking(_STORED, False) = None  # type: ignore[valid-type]
    previous_response_id: lacking(_STORED) = None  # type: ignore[valid-type]
    conversation: lacking(_STORED) = None  # type: ignore[valid-type]
    background: lacking("send stream=true", False) = None  # type: ignore[valid-type]
    include: lacking("there is nothing to include", []) = None  # type: ignore[valid-type]
    truncation: lacking("a conversation that is too long is an error", "disabled") = None  # type: ignore[valid-type]
    max_tool_calls: lacking("there are no tools of this server's own") = None  # type: ignore[valid-type]
    prompt: lacking("there are no stored prompts") = None  # type: ignore[valid-type]
    top_logprobs: lacking("send /v1/chat/completions", 0) = None  # type: ignore[valid-type]
    service_tier: lacking("there is one tier", "auto", "default") = None  # type: ignore[valid-type]
    stream_options: lacking("answers are not padded", {}, {"include_obfuscation": False}) = None  # type: ignore[valid-type]
    prompt_cache_retention: lacking("the prefix cache keeps what it has room for", "in_memory") = None  # type: ignore[valid-type]
    prompt_cache_options: lacking("the prefix cache has no options") = None  # type: ignore[valid-type]
    moderation: lacking("answers are not moderated") = None  # type: ignore[valid-type]
    image: lacking("answers are text") = None  # type: ignore[valid-type]
    context_management: lacking("a conversation that is too long is an error") = None  # type: ignore[valid-type]
    background_options: lacking("send stream=true") = None  # type: ignore[valid-type]
    access_programs: lacking("there are none") = None  # type: ignore[valid-type]
    cyber: lacking("there is none", "standard") = None  # type: ignore[valid-type]


def chat_body(body: ResponsesBody) -> ChatBody:
    """The chat that a body asks for. Raises ApiError."""
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "max_tokens": body.max_output_tokens,
        "tools": [_chat_tool(tool, index) for index, tool in enumerate(_listed(body.tools, "tools"))] or None,
        "tool_choice": _chat_tool_choice(body.tool_choice),
        "response_format": _response_format(body.text),
        "reasoning_effort": _effort(body.reasoning),
        "stream": True,
    }
    for name in (
        "temperature",
        "top_p",
        "parallel_tool_calls",
        "top_k",
        "min_p",
        "repetition_penalty",
        "seed",
        "ignore_eos",
        "chat_template_kwargs",
    ):
        fields[name] = getattr(body, name)
    return ChatBody.model_validate(fields)


def _listed(value: Any, param: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise invalid(param, "must be a list", "invalid_type")
    return value


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        if not body.input:
            raise invalid("input", "is empty")
        return [*messages, {"role": "user", "content": checked_text(body.input, "input")}]
    if not isinstance(body.input, list) or not body.input:
        raise invalid("input", "must be a text or a list of items, at least one", "invalid_type")
    if len(body.input) > MAX_MESSAGES:
        raise invalid("input", f"has {len(body.input)} items, at most {MAX_MESSAGES} go in one request")
    thoughts = ""
    for index, item in enumerate(body.input):
        where = f"input[{index}]"
        if not isinstance(item, dict):
            raise invalid(where, "must be an object", "invalid_type")
        kind = item.get("type", "message")
        _check_keys(item, kind, where)
        if kind == "reasoning":
            thoughts += _text_of(item.get("content") or item.get("summary") or [], f"{where}.content")
        elif kind == "function_call":
            call = _chat_call(item, where)
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = _text_of(item.get("output"), f"{where}.output")
            call_id = checked_text(item.get("call_id"), f"{where}.call_id")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
        else:
            role = item.get("role")
            if role not in ("user", "assistant", "system", "developer"):
                raise invalid(f"{where}.role", "must be user, assistant, system or developer")
            messages.append({"role": role, "content": _text_of(item.get("content"), f"{where}.content")})
        if thoughts and messages and messages[-1]["role"] == "assistant" and kind != "reasoning":
            messages[-1]["reasoning_content"], thoughts = thoughts, ""
    return messages


def _check_keys(item: dict[str, Any], kind: Any, where: str) -> None:
    if not isinstance(kind, str) or kind not in _ITEM_KEYS:
        raise refused(f"{where}.type", f"items of type {str(kind)[:64]!r} are not supported")
    for key, value in item.items():
        if value is not None and key not in {"type", *_LABELS, *_ITEM_KEYS[kind]}:
            raise invalid(where, f"unknown key {key[:64]!r} in an item of type {kind}", "unknown_parameter")


def _text_of(value: Any, where: str) -> str:
    if isinstance(value, str):
        return checked_text(value, where)
    texts = []
    for index, part in enumerate(_listed(value, where)):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "reasoning_text", "summary_text", "text"):
            raise refused(f"{where}[{index}]", "only parts of text are supported")
        texts.append(checked_text(part.get("text"), f"{where}[{index}].text"))
    return "".join(texts)


def _chat_call(item: dict[str, Any], where: str) -> dict[str, Any]:
    name, arguments, call_id = (
        checked_text(item.get(key), f"{where}.{key}") for key in ("name", "arguments", "call_id")
    )
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _chat_tool(tool: Any, index: int) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise refused(f"tools[{index}].type", "only tools of type 'function' are supported")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _chat_tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools = [_chat_tool_choice(tool) for tool in _listed(choice.get("tools"), "tool_choice.tools")]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return choice


def _response_format(text: Any) -> Any:
    if text is None:
        return None
    if not isinstance(text, dict) or text.keys() - {"format", "verbosity"}:
        raise invalid("text", 'must be {"format": {...}}')
    if text.get("verbosity") not in (None, "medium"):
        raise refused("text.verbosity", "say it in a message")
    form = text.get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
    return form


def _effort(reasoning: Any) -> Any:
    if reasoning is None:
        return None
    if not isinstance(reasoning, dict):
        raise invalid("reasoning", "must be an object", "invalid_type")
    for key, value in reasoning.items():
        if key != "effort" and value is not None:
            raise refused(f"reasoning.{key[:64]}", "only effort is supported: thoughts come as they are")
    effort = reasoning.get("effort")
    if effort is not None and effort not in get_args(Effort):
        raise invalid("reasoning.effort", f"must be one of {', '.join(get_args(Effort))}")
    return effort
