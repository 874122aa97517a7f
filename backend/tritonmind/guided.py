"""`response_format`: what an answer must be, as OpenAI's API writes it, with two forms of our own."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from tritonmind.errors import InvalidRequestError
from tritonmind.messages import GuidedDecoding

FIELD = "response_format"
# Of a schema, an expression or a grammar: what it compiles to grows with it, and how deep the compiler recurses.
MAX_SPEC_LENGTH = 64 * 1024


class _Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """A way to write it."""


class _Text(_Form, frozen=True, tag="text"):
    pass


class _JsonObject(_Form, frozen=True, tag="json_object"):
    pass


class _Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`strict` changes nothing: answers are always held to the schema. Name and description are for people."""

    schema: dict[str, Any]
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class _JsonSchema(_Form, frozen=True, tag="json_schema"):
    json_schema: _Schema


class _Regex(_Form, frozen=True, tag="regex"):
    regex: str


class _Grammar(_Form, frozen=True, tag="grammar"):
    grammar: str


_Forms = _Text | _JsonObject | _JsonSchema | _Regex | _Grammar


def parse_response_format(value: object) -> GuidedDecoding | None:
    """What the answer must be, of `response_format` as JSON text or as what that decodes to. None: any text.

    Raises InvalidRequestError for another form. Whether there is such a text at all is seen by GrammarCompiler.
    """
    try:
        form = msgspec.json.decode(value, type=_Forms) if isinstance(value, str) else msgspec.convert(value, _Forms)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(
            FIELD,
            value,
            f"{error}; known are "
            '{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {...}}}, '
            '{"type": "regex", "regex": "..."} and {"type": "grammar", "grammar": "..."}',
        ) from None
    match form:
        case _JsonObject():
            return GuidedDecoding("json_object")
        case _JsonSchema():
            return _json_schema(FIELD, form.json_schema.schema)
        case _Regex():
            return _checked("regex", form.regex)
        case _Grammar():
            return _checked("grammar", form.grammar)
    return None


class _StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's fields of that name, all but one of them None or false."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None
    grammar: str | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False


def parse_structured_outputs(value: object) -> GuidedDecoding | None:
    """The same of vLLM's `structured_outputs`, which Triton's OpenAI front end sends for its tools."""
    name = "structured_outputs"
    try:
        fields = (
            msgspec.json.decode(value, type=_StructuredOutputs)
            if isinstance(value, str)
            else msgspec.convert(value, _StructuredOutputs)
        )
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(name, value, str(error)) from None
    given = {field: wanted for field in fields.__struct_fields__ if (wanted := getattr(fields, field))}
    given.pop("disable_fallback", None)
    match given:
        case {"json": str() | dict() as schema, **rest} if not rest:
            return _json_schema(name, schema)
        case {"regex": str() as expression, **rest} if not rest:
            return _checked("regex", expression)
        case {"choice": list() as texts, **rest} if not rest:
            return _checked("regex", "|".join(map(re.escape, texts)))
        case {"json_object": True, **rest} if not rest:
            return GuidedDecoding("json_object")
    raise InvalidRequestError(
        name, value, f"asks for {' and '.join(given) or 'nothing'}; send json, regex, choice or json_object"
    )


def parse_guide(kind: str | None, guide: str | None) -> GuidedDecoding:
    """The same of TensorRT-LLM's inputs `guided_decoding_guide_type` and `guided_decoding_guide`."""
    if kind == "json":
        return GuidedDecoding("json_schema", "{}")
    if guide is None:
        raise InvalidRequestError("guided_decoding_guide", "", "is missing beside its type")
    if kind == "json_schema":
        return _json_schema("guided_decoding_guide", guide)
    if kind == "regex":
        return _checked("regex", guide)
    raise InvalidRequestError("guided_decoding_guide_type", kind, "must be json, json_schema or regex")


def _json_schema(name: str, schema: str | dict[str, Any]) -> GuidedDecoding:
    """A schema in one spelling, whether it came as text or decoded."""
    try:
        decoded = msgspec.json.decode(schema, type=dict[str, Any]) if isinstance(schema, str) else schema
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(name, schema, f"is no JSON schema: {error}") from None
    return _checked("json_schema", msgspec.json.encode(decoded).decode())


def _checked(kind: Any, spec: str) -> GuidedDecoding:
    if len(spec) > MAX_SPEC_LENGTH:
        raise InvalidRequestError(
            FIELD, f"{kind} of {len(spec)} characters", f"may have {MAX_SPEC_LENGTH} characters: make it simpler"
        )
    return GuidedDecoding(kind, spec)
