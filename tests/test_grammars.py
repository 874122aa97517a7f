"""`response_format` from what a user writes to a guide, and every way in which that is refused."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import make_tokenizer
from tritonmind import grammars
from tritonmind.errors import InvalidRequestError
from tritonmind.grammars import GrammarCompiler, token_table
from tritonmind.guided import MAX_SPEC_LENGTH, parse_response_format
from tritonmind.messages import GuidedDecoding
from tritonmind.tokenizer import Tokenizer

VOCAB = 330  # more than the tokenizer has
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory, vocab=320)
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=VOCAB, eos_token_ids=[EOS])


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": value}}


def allowed(compiler: GrammarCompiler, form: dict[str, Any], text: str, tokenizer: Tokenizer) -> set[int]:
    """The ids that may follow `text`, which the form must allow to begin an answer."""
    guided = parse_response_format(form)
    assert guided is not None
    compiler.check(guided)
    guide = compiler.guide(guided).result(30)
    guide.take(tokenizer.encode_continuation(text))
    assert guide.error is None, guide.error
    bits = np.unpackbits(np.frombuffer(guide.matcher.compute_bitmask(), np.uint8), bitorder="little")
    assert not bits[VOCAB:].any()
    return set(np.flatnonzero(bits).tolist())


@pytest.mark.parametrize(
    ("form", "kind", "spec"),
    [
        ({"type": "json_object"}, "json_object", ""),
        ({"type": "regex", "regex": "a|b"}, "regex", "a|b"),
        ({"type": "grammar", "grammar": 'start: "x"'}, "grammar", 'start: "x"'),
        ({"type": "json_schema", "json_schema": {"schema": {"b": 1, "a": 2}}}, "json_schema", '{"b":1,"a":2}'),
        (schema({}) | {"json_schema": {"schema": {}, "description": "d", "strict": None}}, "json_schema", "{}"),
    ],
)
def test_forms(form: dict[str, Any], kind: Any, spec: str) -> None:
    assert parse_response_format(form) == parse_response_format(json.dumps(form)) == GuidedDecoding(kind, spec)


def test_text_asks_for_nothing() -> None:
    assert parse_response_format({"type": "text"}) is None


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("x", "malformed"),
        ("[" * 50_000, "known are"),
        (7, "known are"),
        ({}, "type"),
        ({"type": "xml"}, "'xml'"),
        ({"type": "regex"}, "`regex`"),
        ({"type": "regex", "regex": 3}, "str"),
        ({"type": "regex", "regex": "a", "flags": "i"}, "flags"),
        ({"type": "json_schema"}, "`json_schema`"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "`schema`"),
        ({"type": "json_schema", "json_schema": {"schema": "a"}}, "object"),
        ({"type": "regex", "regex": "a" * (MAX_SPEC_LENGTH + 1)}, "65537 characters"),
    ],
)
def test_other_forms_are_refused(form: Any, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"response_format=.*{said}"):
        parse_response_format(form)


def chain(length: int) -> dict[str, Any]:
    """A schema as deep as so many references."""
    links: dict[str, Any] = {str(n): {"properties": {"a": {"$ref": f"#/$defs/{n + 1}"}}} for n in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**links, str(length): {"type": "null"}}}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (schema({"type": "string", "minLength": 5, "maxLength": 2}), "minLength .5. is greater"),
        (schema({"type": "integer", "minimum": 5, "maximum": 2}), "minimum .5. is greater"),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"$ref": "#"}), "no text is like that"),
        (schema({"type": "strin"}), "strin"),
        (schema({"not": {"type": "string"}}), "not"),
        (schema({"$ref": "http://example.com/schema"}), "not present"),
        (schema({"x-guidance": 3}), "x-guidance"),
        (schema(json.loads('{"items":' * 400 + "{}" + "}" * 400)), "recursion"),
        (
            schema({"allOf": [{"anyOf": [{"properties": {f"{n} {m}": {}}} for m in range(10)]} for n in range(30)]}),
            "large",
        ),
        ({"type": "regex", "regex": "(a"}, "unclosed group"),
        ({"type": "regex", "regex": r"(a)\1"}, "backreferences"),
        ({"type": "regex", "regex": "(?=a)b"}, "look-around"),
        ({"type": "regex", "regex": "[^\\x00-\\U0010FFFF]"}, "no text is like that"),
        ({"type": "regex", "regex": "ab{100000}"}, "more than 10000 times"),
        ({"type": "regex", "regex": "(" * 20_000}, "regex"),
        ({"type": "grammar", "grammar": "start: nothing"}, "line 1: unknown name"),
        ({"type": "grammar", "grammar": "start: " + "(" * 20_000}, "nested"),
    ],
)
def test_what_no_answer_can_be_held_to_is_refused(form: dict[str, Any], said: str, compiler: GrammarCompiler) -> None:
    guided = parse_response_format(form)
    assert guided is not None
    with pytest.raises(InvalidRequestError, match=rf"(?s)response_format=.*{said}") as caught:
        compiler.check(guided)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "form",
    [
        schema(chain(1300)),
        {
            "type": "grammar",
            "grammar": "start: a0\n" + "".join(f"a{n}: a{n + 1}\n" for n in range(4000)) + 'a4000: "x"',
        },
        {"type": "regex", "regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"},
        {"type": "regex", "regex": "(.|\n)*a(.|\n){500}"},
        {"type": "regex", "regex": "a" * 60_000},
        schema({"type": "string", "pattern": "^(a|b)*a(a|b){900}$", "maxLength": 10**9}),
    ],
    ids=["references", "rules", "repetitions", "states", "text", "pattern"],
)
def test_what_grows_large_ends_no_process_and_costs_a_step_little(form: Any, compiler: GrammarCompiler) -> None:
    """Deep ones overflow a usual stack. CPU seconds are those of this thread, in which an engine would wait."""
    guided = parse_response_format(form)
    assert guided is not None
    try:
        guide = compiler.guide(guided).result(60)
    except InvalidRequestError:
        return
    begin = time.thread_time()
    for _ in range(20):
        mask = np.unpackbits(np.frombuffer(guide.matcher.compute_bitmask(), np.uint8), bitorder="little")
        if guide.matcher.is_error() or mask[EOS]:
            break
        guide.take([int(mask.argmax())])
    assert time.thread_time() - begin < 20 * 0.02


def test_masks_follow_the_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    def texts(form: dict[str, Any], text: str) -> set[bytes]:
        return {tokenizer.token_bytes(number) for number in allowed(compiler, form, text, tokenizer)}

    digits = {"type": "regex", "regex": r"^\d{2}(-a)?$"}
    assert texts(digits, "1") == {str(digit).encode() for digit in range(10)}
    assert texts(digits, "12") == {b"-", b"<|im_end|>"}
    assert texts(digits, "12-a") == {b"<|im_end|>"}
    assert {b"{"} <= texts({"type": "json_object"}, "") and b"[" not in texts({"type": "json_object"}, "")
    small = schema({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]})
    assert {b"t", b"f", b" "} <= texts(small, '{"ok":') and b"1" not in texts(small, '{"ok":')
    assert b" " not in texts(small, '{"ok":' + " " * 64), "spaces without end"
    special = {tokenizer.token_bytes(number) for number in tokenizer.special_token_ids}
    assert not special & texts({"type": "regex", "regex": "(?s).+"}, ""), "a special token is no text"


def test_every_id_of_the_model_has_a_place(tokenizer: Tokenizer) -> None:
    table = token_table(tokenizer, VOCAB)
    assert len(table) == VOCAB and table[-1] == b""
    text = "Größe 你好"
    assert b"".join(table[number] for number in tokenizer.encode(text, add_special_tokens=False)) == text.encode()


def test_what_came_before_is_not_compiled_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB, eos_token_ids=[EOS])
    compiled = []
    compile_one = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda guided: compiled.append(guided.spec) or compile_one(guided))
    monkeypatch.setattr(grammars, "MAX_CACHED", 2)
    for spec in ("a", "b", "a", "c", "a", "b"):
        compiler.guide(GuidedDecoding("regex", spec)).result(30)
        compiler.check(GuidedDecoding("regex", spec))
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="unclosed"):
            compiler.check(GuidedDecoding("regex", "("))
    assert compiled == ["a", "b", "c", "b", "("]
    one, other = (compiler.guide(GuidedDecoding("regex", "b")).result() for _ in range(2))
    one.take([tokenizer.encode("b", add_special_tokens=False)[0]])
    assert one.matcher.is_accepting() and not other.matcher.is_accepting(), "answers share a state"


def test_without_the_library_the_extra_is_named(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequestError, match=r"response_format=.*pip install tritonmind\[guided\]"):
        compiler.check(GuidedDecoding("regex", "not seen before"))


def test_a_model_without_eos_is_refused(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB, eos_token_ids=[])
    with pytest.raises(InvalidRequestError, match="no eos token"):
        compiler.check(GuidedDecoding("json_object"))


def test_a_slow_compilation_is_given_up(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB, eos_token_ids=[EOS])
    monkeypatch.setattr(compiler, "_compile", lambda guided: time.sleep(0.3))
    monkeypatch.setattr(grammars, "COMPILE_TIMEOUT_S", 0.01)
    with pytest.raises(InvalidRequestError, match=r"longer than 0\.01 s"):
        compiler.check(GuidedDecoding("json_object"))


def test_a_tokenizer_that_drops_the_first_space_may_draw_it(compiler: GrammarCompiler, tmp_path: Path) -> None:
    """As Llama-2's: the word after the prompt has a space in its token, which is no part of the text."""
    make_tokenizer(tmp_path, vocab=320)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    steps = [content["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    file.write_text(json.dumps({**content, "decoder": {"type": "Sequence", "decoders": steps}}))
    strips = Tokenizer.from_dir(tmp_path)
    space = strips.encode(" ", add_special_tokens=False)[-1]
    stripping = GrammarCompiler(strips, vocab_size=VOCAB, eos_token_ids=[EOS])
    assert space in allowed(stripping, {"type": "json_object"}, "", strips)
    assert space not in allowed(compiler, {"type": "json_object"}, "", strips)
