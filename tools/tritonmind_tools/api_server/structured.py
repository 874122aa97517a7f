"""What holds an answer to a form: response_format, and a call of a tool that must come."""

from __future__ import annotations

import json
from typing import Any

from tritonmind.guided import parse_response_format
from tritonmind.messages import GuidedDecoding

_DEFINITIONS = "$defs"
_POINTER = f"#/{_DEFINITIONS}/"


def guided(response_format: Any) -> GuidedDecoding | None:
    """What response_format asks for, None for any text. Raises InvalidRequestError."""
    return None if response_format is None else parse_response_format(response_format)


def response_format(form: GuidedDecoding) -> dict[str, Any]:
    """The other way: as parse_response_format reads it."""
    if form.kind == "json_object":
        return {"type": form.kind}
    if form.kind == "json_schema":
        return {"type": form.kind, form.kind: {"schema": json.loads(form.spec)}}
    return {"type": form.kind, form.kind: form.spec}


def guided_call(tools: list[dict[str, Any]]) -> GuidedDecoding | None:
    """A call of one of `tools`, as `tool_calls.FORCED` reads it. Raises InvalidRequestError."""
    definitions: dict[str, Any] = {}
    calls = [_call_schema(tool["function"], definitions) for tool in tools]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if definitions:
        schema[_DEFINITIONS] = definitions
    return guided({"type": "json_schema", "json_schema": {"schema": schema}})


def _call_schema(function: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A call's schema. Definitions of the parameters' own go to the root, where references find them."""
    name = function["name"]
    parameters = _renamed(function.get("parameters") or {"type": "object"}, name)
    own = parameters.pop(_DEFINITIONS, {})
    definitions.update({f"{name}.{key}": value for key, value in own.items()})
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _renamed(schema: Any, prefix: str) -> Any:
    """A copy, with the names in references to definitions behind `prefix`."""
    if isinstance(schema, list):
        return [_renamed(item, prefix) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: _renamed(value, prefix) for key, value in schema.items()}
    reference = copy.get("$ref")
    if isinstance(reference, str) and reference.startswith(_POINTER):
        copy["$ref"] = f"{_POINTER}{prefix}.{reference.removeprefix(_POINTER)}"
    return copy
