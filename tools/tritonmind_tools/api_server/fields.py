"""Values of request bodies that pydantic's types cannot check with a message that says what is wrong.

Each function checks one field and returns it as the rest of the server wants it, or raises ApiError naming it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from pydantic import BeforeValidator, PlainValidator, ValidationInfo, WithJsonSchema

from tritonmind_tools.api_server.errors import ApiError, refused

MAX_TOOLS = 128
MAX_MESSAGES = 2**14  # looking at a million takes seconds, in which no other answer goes on
MAX_ENCODED_BYTES = 4 << 20  # of texts to encode at once, for which a hundred times as much memory is taken
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_TEXT_PARTS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    },
}
_CONTENT: dict[str, Any] = {"anyOf": [{"type": "string"}, _TEXT_PARTS]}
_CALLS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
                "required": ["name", "arguments"],
            },
        },
        "required": ["id", "type", "function"],
    },
}
_MESSAGES_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1, "description": "what the user says, as one message"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
                    "content": {"anyOf": [*_CONTENT["anyOf"], {"type": "null"}]},
                    "name": {"type": "string"},
                    "tool_calls": _CALLS,
                    "tool_call_id": {"type": "string"},
                    "reasoning_content": {"type": "string"},
                },
                "required": ["role", "content"],
                "additionalProperties": False,
            },
        },
    ]
}
# Keys that the openai client writes into an assistant's message that is sent back, without a meaning here when empty.
_EMPTY_KEYS = ("refusal", "audio", "function_call", "annotations")
_REPEATED_KEY = "parsed"  # its content again, as an object of the openai client
_KEYS = {
    "system": {"content", "name"},
    "developer": {"content", "name"},
    "user": {"content", "name"},
    "assistant": {"content", "name", "tool_calls", "reasoning_content", *_EMPTY_KEYS, _REPEATED_KEY},
    "tool": {"content", "tool_call_id"},
}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def checked_text(value: Any, param: str) -> str:
    """A text that UTF-8 can write."""
    if not isinstance(value, str):
        raise invalid(param, "must be a text", "invalid_type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid(param, "has half a surrogate pair, which is no character") from None
    return value


def checked_json(value: Any, param: str) -> None:
    """See that a value that came as JSON can be written as JSON again, by any library."""
    try:
        msgspec.json.encode(value)
        json.dumps(value, allow_nan=False)
    except UnicodeEncodeError:
        raise invalid(param, "has half a surrogate pair, which is no character") from None
    except (RecursionError, OverflowError, msgspec.MsgspecError, ValueError) as error:
        raise invalid(param, f"cannot be written as JSON: {error}") from None


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """Messages as chat templates take them: every content a text, arguments of calls as objects."""
    if isinstance(value, str):
        if not value:
            raise invalid("messages", "is empty")
        return [{"role": "user", "content": checked_text(value, "messages")}]
    if not isinstance(value, list) or not value:
        raise invalid("messages", "must be a list of messages, at least one, or a text", "invalid_type")
    if len(value) > MAX_MESSAGES:
        raise invalid("messages", f"has {len(value)} messages, at most {MAX_MESSAGES} go in one request")
    return [_message(each, f"messages[{index}]") for index, each in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(where, "must be an object with role and content", "invalid_type")
    role = value.get("role")
    if not isinstance(role, str) or role not in _KEYS:
        shown = role if isinstance(role, str) and len(role) < 40 else "this"
        raise invalid(f"{where}.role", f"{shown!r} is none of {', '.join(_KEYS)}")
    for key in value:
        if key != "role" and key not in _KEYS[role]:
            raise invalid(where, f"unknown key {key[:64]!r} in a message of role {role}", "unknown_parameter")
    message: dict[str, Any] = {"role": role}
    calls = value.get("tool_calls")
    content = value.get("content")
    if content is None and role == "assistant" and (calls or value.get("reasoning_content")):
        content = ""
    message["content"] = _content(content, f"{where}.content")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if value.get(key) is not None:
            message[key] = checked_text(value[key], f"{where}.{key}")
    if role == "tool" and "tool_call_id" not in message:
        raise invalid(f"{where}.tool_call_id", "is required in a message of role tool", "missing_required_parameter")
    for key in _EMPTY_KEYS:
        if value.get(key):
            raise refused(f"{where}.{key}", "is not supported")
    if calls is not None and (
        checked := _calls(calls, f"{where}.tool_calls")
    ):  # templates ask whether the key is there
        message["tool_calls"] = checked
    return message


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return checked_text(value, where)
    if not isinstance(value, list) or not value:
        raise invalid(where, "must be a text, or a list of parts", "invalid_type")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image_url", "input_audio", "file"):
            raise refused(f"{where}[{index}]", f"{kind} is not supported: this server's model reads text")
        if kind != "text" or part.keys() != {"type", "text"}:
            raise invalid(f"{where}[{index}]", 'must be {"type": "text", "text": ...}')
        texts.append(checked_text(part["text"], f"{where}[{index}].text"))
    return "".join(texts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise invalid(where, "must be a list", "invalid_type")
    calls = []
    for index, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type") != "function":
            raise invalid(
                f"{where}[{index}]",
                'must be {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}',
            )
        arguments = checked_text(function.get("arguments"), f"{where}[{index}].function.arguments")
        calls.append(
            {
                "id": checked_text(call.get("id"), f"{where}[{index}].id"),
                "type": "function",
                "function": {
                    "name": checked_text(function.get("name"), f"{where}[{index}].function.name"),
                    "arguments": _as_object(arguments),
                },
            }
        )
    return calls


def _as_object(arguments: str) -> Any:
    """Templates write arguments as JSON themselves. What is no JSON, as a model may have made it, stays a text."""
    try:
        value = json.loads(arguments)
        checked_json(value, "arguments")
    except (ValueError, RecursionError, ApiError):
        return arguments
    return value if isinstance(value, dict) else arguments


def checked_tools(value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise invalid("tools", f"must be a list of at most {MAX_TOOLS} tools", "invalid_type")
    names = set()
    for index, tool in enumerate(value):
        where = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise invalid(where, "must be an object", "invalid_type")
        if tool.get("type") != "function":
            raise refused(f"{where}.type", "only tools of type 'function' are supported")
        function = tool.get("function")
        if not isinstance(function, dict) or tool.keys() != {"type", "function"}:
            raise invalid(where, 'must be {"type": "function", "function": {"name": ..., "parameters": {...}}}')
        name = function.get("name")
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            raise invalid(f"{where}.function.name", "must be 1 to 64 letters, digits, _ or -")
        if name in names:
            raise invalid(f"{where}.function.name", f"{name} comes twice")
        names.add(name)
        for key, kind in (("description", str), ("parameters", dict), ("strict", bool)):
            if function.get(key) is not None and not isinstance(function[key], kind):
                raise invalid(f"{where}.function.{key}", f"must be a {kind.__name__}", "invalid_type")
        unknown = sorted(function.keys() - {"name", "description", "parameters", "strict"})
        if unknown:
            raise invalid(f"{where}.function", f"unknown key {unknown[0][:64]!r}", "unknown_parameter")
    checked_json(value, "tools")
    return value or None


def checked_stop(value: Any) -> list[str]:
    """Stop strings. `false`, which clients of LMDeploy send, is none."""
    if value is None or value is False:
        return []
    if value is True:
        raise refused("stop", "true would stop a session: /v1/chat/interactive does that; here it is a text or a list")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise invalid("stop", "must be a text or a list of texts", "invalid_type")
    return [checked_text(text, "stop") for text in texts]


def checked_prompt(value: Any) -> list[str | list[int]]:
    """Prompts of a completion: texts, or token ids."""
    if isinstance(value, str):
        return [checked_text(value, "prompt")]
    if not isinstance(value, list) or not value:
        raise invalid("prompt", "must be a text, token ids, or a list of either, and not empty", "invalid_type")
    if all(_is_id(item) for item in value):
        return [value]
    prompts: list[str | list[int]] = []
    for index, item in enumerate(value):
        if isinstance(item, list) and item and all(_is_id(token_id) for token_id in item):
            prompts.append(item)
        else:
            prompts.append(checked_text(item, f"prompt[{index}]"))
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def checked_logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("logit_bias", "must be an object of numbers by token id", "invalid_type")
    biases = {}
    for key, bias in value.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 10:
            raise invalid("logit_bias", f"{key[:40]!r} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise invalid("logit_bias", f"the bias of {key} must be a number", "invalid_type")
        if not abs(bias) <= 100:
            raise invalid("logit_bias", f"the bias of {key} must be -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def checked_any(value: Any, info: ValidationInfo) -> Any:
    """JSON of any kind, looked at later."""
    checked_json(value, str(info.field_name))
    return value


def checked_variables(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise invalid("chat_template_kwargs", "must be an object", "invalid_type")
    checked_json(value, "chat_template_kwargs")
    return value


def lacking(reason: str, *accepted: Any) -> Any:
    """The type of a field of OpenAI's that is not served, except with the values that ask for nothing."""

    def check(value: Any) -> None:
        if value is not None and not any(value is each or value == each for each in accepted):
            raise _Lacking(reason)

    schema: Mapping[str, Any] = {"enum": [None, *accepted], "description": f"not served: {reason}"}
    return Annotated[Any, BeforeValidator(check), WithJsonSchema(dict(schema))]


class _Lacking(ValueError):
    """Becomes the message of pydantic's error, which knows the field."""


def _typed(check: Callable[..., Any], schema: Mapping[str, Any]) -> Any:
    return Annotated[Any, PlainValidator(check), WithJsonSchema(dict(schema))]


_STRINGS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Json = _typed(checked_any, {})
Messages = _typed(checked_messages, _MESSAGES_SCHEMA)
Tools = _typed(
    checked_tools,
    {
        "type": ["array", "null"],
        "items": {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                        "description": {"type": "string"},
                        "parameters": {"type": "object", "description": "a JSON schema"},
                        "strict": {"type": ["boolean", "null"]},
                    },
                    "required": ["name"],
                },
            },
            "required": ["type", "function"],
        },
    },
)
Stop = _typed(checked_stop, {"anyOf": [{"type": "string"}, _STRINGS, {"enum": [False, None]}]})
Prompt = _typed(
    checked_prompt, {"anyOf": [{"type": "string"}, {**_STRINGS, "minItems": 1}, _IDS, {"type": "array", "items": _IDS}]}
)
LogitBias = _typed(
    checked_logit_bias,
    {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
)
Variables = _typed(checked_variables, {"type": ["object", "null"], "description": "variables of the chat template"})


def checked_turn(value: Any) -> list[dict[str, Any]]:
    """Messages of an interactive request; none for an empty text."""
    return [] if value == "" else checked_messages(value)


def checked_texts(value: Any) -> str | list[str]:
    if not isinstance(value, (str, list)):
        raise invalid("input", "must be a text or a list of texts", "invalid_type")
    named = [("input", value)] if isinstance(value, str) else [(f"input[{at}]", text) for at, text in enumerate(value)]
    num_bytes = sum(len(checked_text(text, name).encode()) for name, text in named)
    if num_bytes > MAX_ENCODED_BYTES:
        raise invalid("input", f"has {num_bytes} bytes, at most {MAX_ENCODED_BYTES} go in one request")
    return value


Turn = _typed(checked_turn, {"anyOf": [{"type": "string"}, _MESSAGES_SCHEMA["anyOf"][1]]})
Texts = _typed(checked_texts, {"anyOf": [{"type": "string"}, _STRINGS]})
