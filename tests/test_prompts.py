"""The next turn of a session, over templates and tokenizers of several families: the ids of the whole conversation."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from tests.test_tokenizer import byte_fallback_backend
from tritonmind.chat_template import ChatTemplate, Message
from tritonmind.errors import InvalidRequestError
from tritonmind.prompts import PromptBuilder
from tritonmind.request_fields import ParsedRequest, SessionFields
from tritonmind.sessions import SessionStore, Turn
from tritonmind.tokenizer import Tokenizer

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + 'inst ' + m['content'] + ' tsni' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}ask.\n{{ m['content'] }}\n\n"
    "{% else %}say.\n{{ m['content'] | trim }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}say.\n{% endif %}"
)
TEMPLATES = {"llama2": LLAMA2, "alpaca": ALPACA}
EOS = 2


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


class Dialogue:
    """One session and what it takes to go on with it."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.builder = PromptBuilder(tokenizer, template)
        self.store = SessionStore(max_sessions=4, max_tokens=10_000)
        self.start = True

    def turn(self, step: int | None = None) -> Turn:
        fields = SessionFields(session_id=1, start=self.start, step=step)
        self.start = False
        return self.store.begin(fields)

    def say(self, messages: list[Message], answer: list[int], *, step: int | None = None) -> list[int]:
        """The prompt of a turn, which then gets this answer."""
        turn = self.turn(step)
        prompt = self.builder.build(ParsedRequest(messages=messages), turn, 4096).token_ids
        self.store.end(turn, messages, prompt, answer, ended_by_token=answer[-1:] == [EOS])
        return prompt

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def whole(self, *messages: Message) -> list[int]:
        return self.ids(self.template.render(list(messages)))


@pytest.fixture(params=TEMPLATES)
def dialogue(request: pytest.FixtureRequest, tmp_path: Path) -> Dialogue:
    byte_fallback_backend().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tmp_path)
    template = ChatTemplate(TEMPLATES[request.param], {"bos_token": "<s>", "eos_token": "</s>"}, where="test")
    return Dialogue(tokenizer, template)


@pytest.mark.parametrize("ended_by_token", [True, False])
def test_next_turns_are_those_of_the_whole_conversation(dialogue: Dialogue, ended_by_token: bool) -> None:
    """The tokenizer puts a space before each text; the middle of a conversation must not get one."""
    first = dialogue.say([user("the cat")], [])
    assert first == dialogue.whole(user("the cat"))
    whole = dialogue.whole(user("the cat"), said("sat"), user("and"))
    answer = whole[len(first) :]
    answer = answer[: _length_of(dialogue, "sat", answer)]
    dialogue.say([user("the cat")], [*answer, EOS] if ended_by_token else answer)
    assert dialogue.say([user("and")], [9]) == whole


def _length_of(dialogue: Dialogue, text: str, token_ids: list[int]) -> int:
    return next(n for n in range(len(token_ids)) if dialogue.tokenizer.decode(token_ids[:n]).strip() == text)


def test_text_that_looks_like_the_mark_or_an_answer(dialogue: Dialogue) -> None:
    text = "mark-5d1f0c9e mark-5d1f0c9e+ ..."
    first = dialogue.say([user(text)], [9])
    second = dialogue.say([user(text + "+")], [9])
    assert second[: len(first) + 1] == [*first, 9]
    assert dialogue.tokenizer.decode(second[len(first) + 1 :]).count("mark") == 2


def test_raw_text_in_the_middle_gets_no_space(dialogue: Dialogue) -> None:
    turn = dialogue.turn()
    first = dialogue.builder.build(ParsedRequest(text="the"), turn, 4096).token_ids
    dialogue.store.end(turn, None, first, [9], ended_by_token=False)
    prompt = dialogue.builder.build(ParsedRequest(text="cat"), dialogue.turn(), 4096).token_ids
    assert prompt[len(first) + 1 :] == [dialogue.tokenizer.vocabulary.backend.token_to_id(letter) for letter in "cat"]


def test_a_template_that_hides_answers_is_refused(tmp_path: Path) -> None:
    byte_fallback_backend().save(str(tmp_path / "tokenizer.json"))
    dialogue = Dialogue(Tokenizer.from_dir(tmp_path), ChatTemplate("{{ messages[-1]['content'] }}", {}, where="test"))
    dialogue.say([user("a")], [9])
    with pytest.raises(InvalidRequestError, match="leaves earlier answers out"):
        dialogue.say([user("b")], [9])


def test_histories_hold_four_bytes_a_token(dialogue: Dialogue) -> None:
    dialogue.say([user("a")], [9])
    (session,) = dialogue.store._sessions.values()
    assert isinstance(session.token_ids, array) and session.token_ids.itemsize == 4
    assert dialogue.store.num_tokens == len(session.token_ids)
