"""Chat templates that are a few texts around each message: what LMDeploy keeps in Python classes and JSON files.

The fields have LMDeploy's names. A template is used as Jinja, like a checkpoint's own, so that there is one way to a
prompt; `jinja_source` is the only place that says in which order the texts come.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from tritonmind.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TurnTemplate:
    """The texts before and after each message.

    meta_instruction: the system text of a conversation that brings none; None is no system text, and "" an empty one.
    assistant opens the answer to come and those that are there; a separator follows each of these. stop_words: tokens
    that end an answer. capability completion: a model that continues texts and has no form for conversations.

    LMDeploy has no names for three more. system_in_user: the system text stands within the next question, behind
    `user`. strip: the white space around a question is left out. given_answer: before an answer that is there only.
    """

    system: str = ""
    meta_instruction: str | None = None
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    tool: str = ""
    eotool: str = ""
    separator: str = ""
    stop_words: tuple[str, ...] = ()
    capability: Literal["chat", "completion"] = "chat"
    system_in_user: bool = False
    strip: bool = False
    given_answer: str = ""

    def jinja_source(self, *, adds_bos: bool) -> str:
        """The template in Jinja. adds_bos: whether the tokenizer begins a text with bos, which then comes first."""
        assert self.capability == "chat", "a completion model has no chat template"
        question = "message['content'] | trim" if self.strip else "message['content']"
        system = f"{_quoted(self.system)} + {{}} + {_quoted(self.eosys)}"
        default = "none" if self.meta_instruction is None else _quoted(self.meta_instruction)
        waiting = ""
        if self.system_in_user:
            on_system = "{%- set state.system = message['content'] -%}"
            waiting = "{%- if state.system is not none -%}{{- " + system.format("state.system") + " -}}{%- endif -%}"
            waiting += "{%- set state.system = none -%}"
            opening = ""
        else:
            on_system = "{{- " + system.format("message['content']") + " -}}"
            opening = "{%- if state.system is not none -%}{{- " + system.format("state.system") + " -}}{%- endif -%}"
        answer = f"{_quoted(self.assistant + self.given_answer)} + message['content'] + "
        lines = [
            "{%- set state = namespace(system=" + default + ") -%}",
            "{%- if messages and messages[0]['role'] == 'system' -%}{%- set state.system = none -%}{%- endif -%}",
            ("{{- bos_token -}}" if adds_bos else "") + opening,
            "{%- for message in messages -%}",
            "{%- if message['role'] == 'system' -%}" + on_system,
            "{%- elif message['role'] == 'user' -%}{{- " + _quoted(self.user) + " -}}" + waiting,
            "{{- " + f"({question}) + {_quoted(self.eoh)}" + " -}}",
            "{%- elif message['role'] == 'assistant' -%}{{- " + answer + _quoted(self.eoa + self.separator) + " -}}",
        ]
        if self.tool or self.eotool:
            tool = f"{_quoted(self.tool)} + message['content'] + {_quoted(self.eotool)}"
            lines.append("{%- elif message['role'] == 'tool' -%}{{- " + tool + " -}}")
        lines += [
            "{%- else -%}{{- raise_exception('role ' + message['role'] + ' has no place in this template') -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{- " + _quoted(self.assistant) + " -}}{%- endif -%}",
        ]
        return "\n".join(line for line in lines if line) + "\n"


def turn_template_from_json(path: Path, known: Callable[[str], TurnTemplate | None]) -> TurnTemplate:
    """LMDeploy's JSON file: fields of a TurnTemplate, over those of the template that `model_name` names, if any.

    Raises ConfigError naming the file and the field.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object of texts such as system, user and assistant")
    base = known(str(data.pop("model_name", ""))) or TurnTemplate()
    names = [field.name for field in dataclasses.fields(TurnTemplate)]
    if unknown := sorted(data.keys() - set(names)):
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; known keys are model_name, {', '.join(names)}")
    given = {key: value for key, value in data.items() if value is not None}
    try:
        return msgspec.convert({**dataclasses.asdict(base), **given}, TurnTemplate)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None


def _quoted(text: str) -> str:
    """A Jinja string: its escapes are Python's."""
    return repr(text)
