"""Chat messages to a prompt, by the Jinja template that came with the checkpoint.

The template is somebody else's program: it runs in a sandbox that can read its inputs and change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from tritonmind.errors import ConfigError, InvalidRequestError
from tritonmind.vocabularies.base import TOKENIZER_CONFIG_FILE, read_json_object

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
# A checkpoint may have another template for conversations with tools: beside the first file, or by name in the others.
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"
_DEFAULT_NAME, _TOOL_NAME = "default", "tool_use"
# Texts of a message: the first two are in each one. Beside them an assistant's message may have tool_calls.
MESSAGE_KEYS = ("role", "content")
OPTIONAL_MESSAGE_KEYS = ("name", "tool_call_id", "reasoning_content")
TOOL_CALLS = "tool_calls"

Message = dict[str, Any]
T = TypeVar("T")


class _TemplateRefusal(Exception):
    """The template called raise_exception."""


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own `tojson` this does not escape for HTML: the text goes to a model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format_string: str) -> str:
    return datetime.now().strftime(format_string)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what a model is trained on; a prompt just contains it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. special_tokens: what it may name, such as bos_token and eos_token.

    tool_source: the text for conversations with tools, None where it is `source`. sources: both. variables: names that
    they take from outside, such as tools.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, where: str, tool_source: str | None = None
    ) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.sources = (source,) if tool_source is None else (source, tool_source)
        try:
            self._templates = [environment.from_string(text) for text in self.sources]
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{where}: the chat template is broken at line {error.lineno}: {error.message}") from None
        self._special_tokens = dict(special_tokens)
        names = (jinja2.meta.find_undeclared_variables(environment.parse(text)) for text in self.sources)
        self.variables: set[str] = set().union(*names)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text, special tokens written out: encode it without adding any.

        tools: functions that the model may call, as in OpenAI's API. variables: of the template's own, such
        as enable_thinking. Raises InvalidRequestError when the template refuses the messages (an odd order of roles,
        say), or has no use for tools.
        """
        if tools and "tools" not in self.variables:
            raise InvalidRequestError("tools", list(tools), "this checkpoint's chat template has no place for tools")
        try:
            return self._templates[-1 if tools else 0].render(
                {
                    **self._special_tokens,
                    **(variables or {}),
                    "messages": list(messages),
                    "tools": list(tools) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except RecursionError:
            raise InvalidRequestError("messages", f"{len(messages)} messages", "are nested too deeply") from None
        except _TemplateRefusal as error:
            raise InvalidRequestError("messages", list(messages), f"the chat template refuses it: {error}") from None
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequestError(
                "messages", list(messages), f"the chat template fails on it: {type(error).__name__}: {error}"
            ) from None


class TemplateText(NamedTuple):
    """A template's source, the file that it is in, and the source for conversations with tools, if that is another."""

    source: str
    where: str
    tool_source: str | None = None


def find_chat_template(tokenizer_dir: str | Path) -> TemplateText | None:
    """The checkpoint's own template, None when it has none.

    chat_template.jinja comes before chat_template.json and that before the `chat_template` of tokenizer_config.json,
    which is a text or a list of named ones: "default", and "tool_use" where there are tools. Raises ConfigError naming
    a file that is wrong.
    """
    directory = Path(tokenizer_dir)
    file = directory / TEMPLATE_FILE
    if file.is_file():
        with_tools = directory / TOOL_TEMPLATE_FILE
        return TemplateText(_text_of(file), str(file), _text_of(with_tools) if with_tools.is_file() else None)
    for name in (TEMPLATE_JSON_FILE, TOKENIZER_CONFIG_FILE):
        file = directory / name
        source, tool_source = read_json_object(file).get("chat_template"), None
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source, tool_source = named.get(_DEFAULT_NAME), named.get(_TOOL_NAME)
        if isinstance(source, str) and isinstance(tool_source, str | None):
            return TemplateText(source, str(file), tool_source)
        if source is not None:
            raise ConfigError(f"{file}: chat_template must be a text or a list of named texts")
    return None


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None


def load_chat_template(tokenizer_dir: str | Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template that find_chat_template finds. Raises ConfigError naming a file whose template is broken."""
    found = find_chat_template(tokenizer_dir)
    if found is None:
        return None
    return ChatTemplate(found.source, special_tokens, where=found.where, tool_source=found.tool_source)


def parse_messages(text: str) -> list[Message]:
    """Messages from JSON: a list, at least one, of objects with `role`, `content` and what may go with them.

    Raises InvalidRequestError naming the message and the key.
    """
    return _parsed("messages", text, _checked_messages)


def parse_tools(text: str) -> list[dict[str, Any]]:
    """Tools from JSON: a list of {"type": "function", "function": {"name": ...}}. Raises InvalidRequestError."""
    return _parsed("tools", text, _checked_tools)


def parse_template_variables(text: str) -> dict[str, Any]:
    """A template's own variables from a JSON object. Raises InvalidRequestError."""
    return _parsed("chat_template_kwargs", text, _checked_variables)


def _parsed(field: str, text: str, check: Callable[[Any], T]) -> T:
    try:
        return check(msgspec.json.decode(text))
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InvalidRequestError(field, text, f"is not JSON: {error}") from None
    except RecursionError:  # from decoding, or from an error that shows what was decoded
        raise InvalidRequestError(field, text, "is nested too deeply") from None


def _checked_tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, list):
        raise InvalidRequestError("tools", tools, "must be a JSON list of tools")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(
                f"tools[{index}]", tool, 'must be {"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
    return tools


def _checked_variables(variables: Any) -> dict[str, Any]:
    if not isinstance(variables, dict):
        raise InvalidRequestError("chat_template_kwargs", variables, "must be a JSON object")
    return variables


def _checked_messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages", messages, "must be a JSON list of {role, content} objects, at least one")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequestError(f"messages[{index}]", message, "must be an object with role and content")
        for key in (*MESSAGE_KEYS, *(key for key in OPTIONAL_MESSAGE_KEYS if key in message)):
            if not isinstance(message.get(key), str):
                raise InvalidRequestError(f"messages[{index}].{key}", message.get(key), "must be a text")
        calls = message.get(TOOL_CALLS, [])
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise InvalidRequestError(f"messages[{index}].{TOOL_CALLS}", calls, "must be a list of objects")
        known = (*MESSAGE_KEYS, *OPTIONAL_MESSAGE_KEYS, TOOL_CALLS)
        for key in message:
            if key not in known:
                raise InvalidRequestError(
                    f"messages[{index}]", {key: message[key]}, f"only {', '.join(known)} are known"
                )
    return messages
