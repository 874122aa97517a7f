"""tokenizer.model and qwen.tiktoken: ids and texts as sentencepiece and tiktoken themselves have them, streamed too."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from tests.vocabularies import INTERNLM_SYMBOLS, TEXTS, train_sentencepiece, train_tiktoken, write_config
from tritonmind.checkpoints.tokenizer_files import collect_tokenizer, special_token_id
from tritonmind.errors import CheckpointError, ConfigError
from tritonmind.tokenizer import Tokenizer
from tritonmind.vocabularies.tiktoken_file import QWEN_PATTERN, QWEN_SPECIAL_TOKENS

# Models as Llama's and InternLM's are trained, and as sentencepiece trains by default: another algorithm, text
# normalised, superfluous spaces dropped, no bytes.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "internlm": {"symbols": INTERNLM_SYMBOLS},
    "unigram": {
        "model_type": "unigram",
        "byte_fallback": False,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "vocab": 200,
        "character_coverage": 1.0,
    },
    "no prefix": {"add_dummy_prefix": False},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabularies")
    for kind, options in KINDS.items():
        train_sentencepiece(root / kind, **options)
    train_tiktoken(root / "qwen")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def vocabularies(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_dir(path) for name, path in directories.items()}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, sentencepiece.SentencePieceProcessor]:
    return {
        kind: sentencepiece.SentencePieceProcessor(model_file=str(directories[kind] / "tokenizer.model"))
        for kind in KINDS
    }


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    detokenizer = tokenizer.detokenizer(**options)
    return "".join([*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()])


# Runs of few letters and spaces are where merges of equal rank meet; the rest is anything.
texts = st.one_of(st.text(max_size=40), st.text("ab \n", max_size=40), st.sampled_from(TEXTS))


@settings(max_examples=120, deadline=None)
@given(kind=st.sampled_from(list(KINDS)), text=texts)
def test_sentencepiece_ids_and_texts_are_the_librarys(
    vocabularies: dict[str, Tokenizer], models: dict[str, Any], kind: str, text: str
) -> None:
    if any(token in text for token in ("<s>", "</s>", "<unk>")):
        return
    ours, theirs = vocabularies[kind], models[kind]
    ids = theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False) == ids
    assert ours.encode_prompt(text) == [1, *ids]
    if 0 not in ids:  # the library writes an unknown token as " ⁇ ", where Transformers leaves it out
        assert streamed(ours, ids) == ours.decode(ids) == theirs.decode(ids)
    if kind in ("llama", "internlm", "no prefix"):
        assert ours.decode(ids) == text.replace("\u2581", " ")
        more = ours.encode_continuation(text)
        assert ours.decode([*ids, *more]) == text.replace("\u2581", " ") * 2
        assert streamed(ours, more, continues=True) == text.replace("\u2581", " ")


@settings(max_examples=120, deadline=None)
@given(kind=st.sampled_from(list(KINDS)), data=st.data())
def test_any_sentencepiece_ids_decode_as_the_library_does(
    vocabularies: dict[str, Tokenizer], models: dict[str, Any], kind: str, data: st.DataObject
) -> None:
    ours, theirs = vocabularies[kind], models[kind]
    number = st.one_of(st.integers(1, min(300, ours.vocab_size - 1)), st.integers(1, ours.vocab_size - 1))
    ids = data.draw(st.lists(number, max_size=30))
    # Control tokens are left out first, as Transformers does: the library would end a character's bytes at one.
    expected = theirs.decode([token_id for token_id in ids if not theirs.is_control(token_id)])
    assert streamed(ours, ids) == ours.decode(ids)
    if "\ufffd" in expected:  # the library has one for each byte, we one for each run of them
        assert ours.decode(ids).replace("\ufffd", "") == expected.replace("\ufffd", "")
    else:
        assert ours.decode(ids) == expected


@pytest.fixture(scope="module")
def encoding(directories: dict[str, Path]) -> tiktoken.Encoding:
    ranks = load_tiktoken_bpe(str(directories["qwen"] / "qwen.tiktoken"))
    special = {text: len(ranks) + number for number, text in enumerate(QWEN_SPECIAL_TOKENS)}
    return tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_qwen_ids_and_texts_are_tiktokens(
    vocabularies: dict[str, Tokenizer], encoding: tiktoken.Encoding, data: st.DataObject, skip: bool
) -> None:
    ours = vocabularies["qwen"]
    parts = data.draw(st.lists(st.one_of(texts, st.sampled_from(["<|im_start|>", "<|im_end|>", "<|extra_7|>"]))))
    text = unicodedata.normalize("NFC", "".join(parts))
    ids = encoding.encode(text, allowed_special="all")
    assert ours.encode(text, add_special_tokens=True) == ours.encode_continuation(text) == ids
    assert streamed(ours, ids, skip_special_tokens=False) == text
    anything = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=30))
    known = [i for i in anything if i < ours.vocab_size and not (skip and i in ours.special_token_ids)]
    expected = encoding.decode_bytes(known).decode("utf-8", "replace")
    assert streamed(ours, anything, skip_special_tokens=skip) == expected


def test_qwen_normalises_and_knows_its_special_tokens(vocabularies: dict[str, Tokenizer]) -> None:
    qwen = vocabularies["qwen"]
    assert qwen.encode("e\u0301", add_special_tokens=False) == qwen.encode("é", add_special_tokens=False)
    assert (qwen.bos_token, qwen.eos_token) == (None, "<|endoftext|>")
    start = qwen.vocabulary.token_id("<|im_start|>")
    assert start == qwen.eos_token_id + 1 and qwen.token_bytes(start) == b"<|im_start|>"
    assert qwen.vocabulary.token_id("<|nothing|>") is None and qwen.token_bytes(qwen.vocab_size) == b""
    assert len(QWEN_SPECIAL_TOKENS) == 208 and qwen.vocabulary.token_id("<|extra_204|>") == qwen.vocab_size - 1


def test_internlm_roles_and_written_out_special_tokens(vocabularies: dict[str, Tokenizer], models: Any) -> None:
    tokenizer, model = vocabularies["internlm"], models["internlm"]
    user, eoa = (model.piece_to_id(symbol) for symbol in ("<|User|>", "<eoa>"))
    ids = tokenizer.encode_prompt("<s><|User|>:hi<eoa>\n")
    assert ids.count(1) == 1 and ids[0] == 1, "one bos"
    assert ids[1:] == model.encode("<|User|>:hi<eoa>\n") and user in ids and eoa in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> <|User|>:hi<eoa>\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def spaced(directory: Path, **config: Any) -> list[int]:
    write_config(directory, **config)
    return Tokenizer.from_dir(directory).encode("a</s>b", add_special_tokens=True)


def test_where_the_space_before_a_text_goes(tmp_path: Path) -> None:
    """By Transformers' rules: each text between special tokens has one, or with `legacy: false` only the first."""
    train_sentencepiece(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    spaced_a, spaced_b, b = model.encode("a"), model.encode("b"), [model.piece_to_id("b")]
    assert spaced_b != b
    assert spaced(tmp_path) == [1, *spaced_a, 2, *spaced_b]
    assert spaced(tmp_path, legacy=False) == [1, *spaced_a, 2, *b]
    assert spaced(tmp_path, add_prefix_space=False) == [1, model.piece_to_id("a"), 2, *b]
    assert spaced(tmp_path, add_bos_token=False, add_eos_token=True) == [*spaced_a, 2, *spaced_b, 2]
    assert Tokenizer.from_dir(tmp_path).encode_continuation("b") == b


def test_added_tokens(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path)
    size = Tokenizer.from_dir(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size, "[PAD]": size + 1}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "[PAD]", "additional_special_tokens": ["<image>"]})
    )
    decoder = {str(size + 2): {"content": "<image>", "special": False, "lstrip": True, "rstrip": True}}
    write_config(tmp_path, added_tokens_decoder=decoder, eos_token={"content": "<tool>"})
    tokenizer = Tokenizer.from_dir(tmp_path)
    ids = tokenizer.encode("a  <image>  b<tool>", add_special_tokens=False)
    a, b = (tokenizer.encode(text, add_special_tokens=False) for text in "ab")
    assert ids == [*a, size + 2, *b, size]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<image> b<tool>"
    assert tokenizer.decode(ids) == "a b" and {size, size + 1, size + 2} <= tokenizer.special_token_ids
    assert tokenizer.eos_token_id == size and tokenizer.vocab_size == size + 3


def test_a_checkpoints_files_are_taken_as_they_are(directories: dict[str, Path], tmp_path: Path) -> None:
    for kind, file in (("llama", "tokenizer.model"), ("qwen", "qwen.tiktoken")):
        destination = tmp_path / kind
        destination.mkdir()
        collect_tokenizer(directories[kind], destination)
        assert (destination / file).read_bytes() == (directories[kind] / file).read_bytes()
        assert special_token_id(destination, "eos_token") == Tokenizer.from_dir(destination).eos_token_id
    assert special_token_id(tmp_path / "qwen", "bos_token") is None


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer.model", b"no model", "is not a sentencepiece model"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 1 2\n", "qwen.tiktoken:2:"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 2\n", "do not count from 0"),
        ("qwen.tiktoken", b"IQ== 0\n", "has no token for the byte 0"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: bytes, problem: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=problem):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(("kind", "package"), [("llama", "sentencepiece"), ("qwen", "tiktoken")])
def test_a_missing_package_is_named(
    directories: dict[str, Path], tmp_path: Path, kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CheckpointError, match=rf"needs the package {package}: pip install 'tritonmind\[tokenizers\]'"):
        collect_tokenizer(directories[kind], tmp_path)
