"""How the served model writes calls of tools and its thoughts: by the command line, else by its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritonmind.errors import InvalidRequestError
from tritonmind_tools.api_server.tool_calls import FORMATS, ReasoningParser

if TYPE_CHECKING:
    from tritonmind.chat_template import ChatTemplate

AUTO, NONE, PROMPT, THINK = "auto", "none", "prompt", "think"
TOOL_PARSERS = (AUTO, NONE, *FORMATS, PROMPT)
REASONING_PARSERS = (AUTO, NONE, THINK)
# A template that has one of these marks writes calls in that format.
_SIGNS = {"internlm2": "<|plugin|>", "hermes": "<tool_call>", "llama3": "<|start_header_id|>ipython"}
_INSTRUCTIONS = """You may call functions to answer. They are, one a line, between <tools> and </tools>:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and its arguments between <tool_call> and </tool_call>:
<tool_call>
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""


@dataclass(frozen=True)
class Dialect:
    """tool_parser: a key of FORMATS, PROMPT where we describe the tools ourselves, None where there are no calls.

    template: the model's, None where it is not known.
    """

    tool_parser: str | None
    has_reasoning: bool
    template: ChatTemplate | None

    def starts_inside(self, variables: dict[str, Any] | None) -> bool:
        """Whether a prompt ends with the thinking opened."""
        if self.template is None:
            return False
        try:
            prompt = self.template.render([{"role": "user", "content": "Hello"}], variables=variables)
        except InvalidRequestError:
            return False
        return prompt.rstrip().endswith(ReasoningParser.OPEN)


def find_dialect(template: ChatTemplate | None, tool_parser: str, reasoning_parser: str) -> Dialect:
    """tool_parser, reasoning_parser: of TOOL_PARSERS and REASONING_PARSERS."""
    source = "" if template is None else "\n".join(template.sources)
    found: str | None = tool_parser
    if tool_parser == AUTO:
        knows_tools = template is not None and "tools" in template.variables
        found = next((name for name, sign in _SIGNS.items() if knows_tools and sign in source), None)
    elif tool_parser == NONE:
        found = None
    thinks = reasoning_parser == THINK or (reasoning_parser == AUTO and ReasoningParser.CLOSE in source)
    return Dialect(found, thinks, template)


def described(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools: they are described in the system's, calls and results are texts."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    instructions = _INSTRUCTIONS.format(tools=lines)
    plain = [_plain(message) for message in messages]
    if plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{instructions}"}, *plain[1:]]
    return [{"role": "system", "content": instructions}, *plain]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    texts = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls", ()):
        body = json.dumps(call["function"], ensure_ascii=False)
        texts.append(f"<tool_call>\n{body}\n</tool_call>")
    return {"role": message["role"], "content": "\n".join(texts)}
