"""`response_format`: what an answer must be, as OpenAI's API writes it, with two forms of our own."""

from __future__ import annotations

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
            return _checked("json_schema", msgspec.json.encode(form.json_schema.schema).decode())
        case _Regex():
            return _checked("regex", form.regex)
        case _Grammar():
            return _checked("grammar", form.grammar)
    return None


def _checked(kind: Any, spec: str) -> GuidedDecoding:
    if len(spec) > MAX_SPEC_LENGTH:
        raise InvalidRequestError(
            FIELD, f"{kind} of {len(spec)} characters", f"may have {MAX_SPEC_LENGTH} characters: make it simpler"
        )
    return GuidedDecoding(kind, spec)
