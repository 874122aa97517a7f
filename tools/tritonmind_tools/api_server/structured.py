"""What holds an answer to a form: response_format, and a call of a tool that must come."""

from __future__ import annotations

import json
from typing import Any

from tritonmind.errors import InvalidRequestError
from tritonmind.guided import FIELD, parse_response_format
from tritonmind.messages import GuidedDecoding


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
    try:
        if len(tools) == 1:
            schema = _call_schema(tools[0]["function"], "#")
        else:
            schema = {"anyOf": [_call_schema(tool["function"], f"#/anyOf/{at}") for at, tool in enumerate(tools)]}
    except RecursionError:
        raise InvalidRequestError(FIELD, f"{len(tools)} tools", "are nested too deeply") from None
    return guided({"type": "json_schema", "json_schema": {"schema": schema}})


def _call_schema(function: dict[str, Any], place: str) -> dict[str, Any]:
    """A call's schema, which is to stand at `place`, a pointer."""
    parameters = {"type": "object", **(function.get("parameters") or {})}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": _moved(parameters, f"{place}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """A copy whose references to itself hold where it stands at `place`."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: _moved(value, place) for key, value in schema.items()}
    reference = copy.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        copy["$ref"] = place + reference.removeprefix("#")
    return copy
