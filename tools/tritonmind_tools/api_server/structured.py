"""What holds an answer to a form: response_format, and a call that must come."""

from __future__ import annotations

from typing import Any

from tritonmind_tools.api_server.errors import refused
from tritonmind_tools.api_server.fields import checked_json, invalid

KINDS = ("text", "json_object", "json_schema", "regex")


def checked_response_format(value: Any) -> dict[str, Any] | None:
    """response_format without what has no effect; None where any text will do. Raises ApiError naming what is wrong."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in KINDS:
        raise invalid("response_format.type", f"must be one of {', '.join(KINDS)}")
    assert isinstance(value, dict)
    allowed = {"json_schema": {"type", "json_schema"}, "regex": {"type", "regex"}}.get(kind, {"type"})
    unknown = sorted(value.keys() - allowed)
    if unknown:
        raise invalid("response_format", f"unknown key {unknown[0][:64]!r} with type {kind}", "unknown_parameter")
    if kind == "regex":
        if not isinstance(value.get("regex"), str):
            raise invalid("response_format.regex", "must be a text", "invalid_type")
        checked_json(value, "response_format")
        return {"type": "regex", "regex": value["regex"]}
    if kind == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": _schema(value.get("json_schema"))}}
    return None if kind == "text" else {"type": kind}


def _schema(value: Any) -> dict[str, Any]:
    where = "response_format.json_schema"
    if not isinstance(value, dict) or not isinstance(value.get("schema"), dict):
        raise invalid(where, 'must be {"name": ..., "schema": {...}}')
    unknown = sorted(value.keys() - {"name", "schema", "description", "strict"})
    if unknown:
        raise invalid(where, f"unknown key {unknown[0][:64]!r}", "unknown_parameter")
    checked_json(value, where)
    schema: dict[str, Any] = value["schema"]
    return schema


def calls_schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of `tools`, as `tool_calls.FORCED` reads it."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def guided(response_format: dict[str, Any] | None, param: str = "response_format") -> dict[str, Any]:
    """Options of SamplingParams that hold an answer to a form. Raises ApiError."""
    if response_format is None:
        return {}
    raise refused(param, "structured output is not available in this version")
