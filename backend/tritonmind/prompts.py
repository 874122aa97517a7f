"""The token ids that a request's answer follows: its text, ids or messages, after the history of its session."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tritonmind.chat_template import ChatTemplate, Message
from tritonmind.errors import InvalidRequestError
from tritonmind.request_fields import ParsedRequest
from tritonmind.sessions import ChatTurn, Turn
from tritonmind.tokenizer import Tokenizer

# A text that no template writes of itself.
_MARK = "mark-5d1f0c9e"


class Prompt(NamedTuple):
    """Token ids of the whole prompt, and the text of what the request itself brought."""

    token_ids: list[int]
    text: str


class PromptBuilder:
    """Makes prompts with a checkpoint's tokenizer and chat template. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    def build(self, request: ParsedRequest, turn: Turn | None, max_model_len: int) -> Prompt:
        """The prompt of `request`, behind the history of `turn`. Raises InvalidRequestError."""
        if request.messages is not None:
            return self._chat(request, request.messages, turn, max_model_len)
        field = "input_ids" if request.text is None else "text_input"
        history = [] if turn is None else turn.text_history(field)
        if request.text is None:
            assert request.input_ids is not None
            text = self._tokenizer.decode(request.input_ids) if request.echo else ""
            return _joined(history, request.input_ids, text, max_model_len)
        self._check_size(field, request.text, max_model_len)
        token_ids = (
            self._tokenizer.encode_continuation(request.text)
            if history
            else self._tokenizer.encode_prompt(request.text)
        )
        return _joined(history, token_ids, request.text, max_model_len)

    def _chat(self, request: ParsedRequest, messages: list[Message], turn: Turn | None, max_model_len: int) -> Prompt:
        if self._chat_template is None:
            raise InvalidRequestError(
                "messages", messages, "this checkpoint has no chat template: send text_input instead"
            )
        turns = [] if turn is None else turn.chat_turns()

        def render(conversation: list[Message]) -> str:
            assert self._chat_template is not None
            return self._chat_template.render(conversation, tools=request.tools, variables=request.template_variables)

        text = next_turn(render, turns, messages) if turns else render(messages)
        self._check_size("messages", text, max_model_len)
        if turn is None or not turns:
            return Prompt(self._tokenizer.encode(text, add_special_tokens=False), text)
        history = turn.history
        if turns[-1].ended_by_token:
            history.pop()
        return _joined(history, self._tokenizer.encode_continuation(text), text, max_model_len)

    def _check_size(self, field: str, text: str, max_model_len: int) -> None:
        """Refuse, before the work of encoding it, a text that cannot fit whatever its tokens are."""
        longest = self._tokenizer.longest_token
        num_bytes = len(text.encode())
        if num_bytes > max_model_len * longest:
            raise InvalidRequestError(
                field,
                f"{num_bytes} bytes",
                f"session_len is {max_model_len} tokens and a token has at most {longest} bytes: send a shorter text",
            )


def next_turn(render: Callable[[list[Message]], str], turns: list[ChatTurn], messages: list[Message]) -> str:
    """What the template writes between the last answer and the next: the end of that answer, and `messages`.

    The answers are in the history as token ids, so a mark stands for the last one, and the text behind it is wanted.
    """
    mark = _MARK
    said = [message["content"] for part in (*(turn.messages for turn in turns), messages) for message in part]
    while any(mark in content for content in said):
        mark += "+"
    conversation: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        answer = mark if number == len(turns) else "..."
        conversation += [*turn.messages, {"role": "assistant", "content": answer}]
    _, found, text = render([*conversation, *messages]).rpartition(mark)
    if not found:
        raise InvalidRequestError(
            "messages", messages, "the chat template leaves earlier answers out: send whole conversations, no session"
        )
    return text


def _joined(history: list[int], token_ids: list[int], text: str, max_model_len: int) -> Prompt:
    if history and len(history) + len(token_ids) >= max_model_len:
        raise InvalidRequestError(
            "prompt",
            f"{len(history)} tokens of history and {len(token_ids)} new ones",
            f"session_len is {max_model_len} and the answer needs at least one: rewind with step, or start anew",
        )
    return Prompt(history + token_ids, text)
