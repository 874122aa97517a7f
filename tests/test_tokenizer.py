"""Tokenizer and incremental detokeniser against the tokenizers library: a real vocabulary, a byte-fallback one."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from tests.vocabularies import TEXTS
from tritonmind.errors import ConfigError
from tritonmind.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def smollm2(smollm2_workspace: Path) -> Tokenizer:
    directory = smollm2_workspace / "triton_models" / "tokenizer"
    return Tokenizer.from_dir(directory)


def byte_fallback_backend() -> tokenizers.Tokenizer:
    """A vocabulary as sentencepiece makes them for Llama: pieces with U+2581 for spaces, the 256 bytes, few letters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,", "▁th", "th", "▁e", "▁▁"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "th"), ("t", "h"), ("▁", "e"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("byte_fallback")
    byte_fallback_backend().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "model_max_length": 10})
    )
    return Tokenizer.from_dir(directory)


def pieces(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vocabulary", ["smollm2", "byte_fallback"])
def test_texts_round_trip_piece_by_piece(vocabulary: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(vocabulary)
    ids = tokenizer.encode(text, add_special_tokens=False)
    streamed = pieces(tokenizer, ids)
    # Where a space is written as U+2581, that character cannot be told from one.
    expected = text.replace("\u2581", " ") if vocabulary == "byte_fallback" else text
    assert "".join(streamed) == expected == tokenizer.vocabulary.backend.decode(ids)
    # Nothing but the text's own U+FFFD is ever shown, and nothing is left for the end.
    assert "".join(streamed).count("\ufffd") == text.count("\ufffd")
    assert streamed[-1] == ""


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_decode_as_the_library_does(smollm2: Tokenizer, data: st.DataObject, skip: bool) -> None:
    """Byte-level BPE: also for broken bytes, special tokens, and ids outside the vocabulary."""
    some_id = st.one_of(st.integers(0, 300), st.integers(0, smollm2.vocab_size + 5))
    ids = data.draw(st.lists(some_id, max_size=40))
    expected = smollm2.vocabulary.backend.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces(smollm2, ids, skip_special_tokens=skip)) == expected
    assert smollm2.decode(ids, skip_special_tokens=skip) == expected


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(smollm2: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    """SmolLM2's vocabulary lacks some bytes, so there the library's decoding is the most one can have."""
    ids = byte_fallback.encode(text, add_special_tokens=False)
    if byte_fallback.special_token_ids.isdisjoint(ids):
        assert "".join(pieces(byte_fallback, ids)) == text
    ids = smollm2.encode(text, add_special_tokens=False)
    assert "".join(pieces(smollm2, ids)) == smollm2.vocabulary.backend.decode(ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 295), max_size=40))
def test_byte_fallback_keeps_every_whole_character(byte_fallback: Tokenizer, ids: list[int]) -> None:
    """Equal to the library where it finds whole characters; where it does not, ours still shows those beside."""
    streamed = "".join(pieces(byte_fallback, ids))
    expected = byte_fallback.vocabulary.backend.decode(ids)
    if "\ufffd" not in expected:
        assert streamed == expected
    else:
        assert set(expected) <= set(streamed) | {"\ufffd"}
        assert streamed.count("\ufffd") <= expected.count("\ufffd")


def test_half_a_character_is_held_back_and_flushed(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("a𒀀b", add_special_tokens=False)  # cuneiform: its four bytes are several tokens
    assert len(ids) > 3
    streamed = pieces(smollm2, ids)
    assert "".join(streamed) == "a𒀀b"
    assert "" in streamed[1:-1]
    assert "".join(pieces(smollm2, ids[:2])).startswith("a\ufffd")


def test_detokenising_costs_the_same_however_long_the_answer(smollm2: Tokenizer) -> None:
    """Broken bytes that never become a character are the worst case of a window that waits for one."""
    broken = next(i for i in range(smollm2.vocab_size) if smollm2.token_bytes(i) == b"\xe2")

    def seconds(count: int) -> float:
        detokenizer = smollm2.detokenizer()
        begin = time.perf_counter()
        for _ in range(count):
            detokenizer.push(broken)
        return time.perf_counter() - begin

    seconds(1000)
    short = min(seconds(2000) for _ in range(3))
    long = min(seconds(40000) for _ in range(3))
    assert long < 20 * short * 4, "twenty times the tokens must cost about twenty times as much"


def test_special_tokens_and_bos(byte_fallback: Tokenizer, smollm2: Tokenizer) -> None:
    assert (byte_fallback.bos_token, byte_fallback.bos_token_id) == ("<s>", 1)
    assert (byte_fallback.eos_token, byte_fallback.eos_token_id) == ("</s>", 2)
    assert smollm2.eos_token == "<|im_end|>"
    ids = [1, *byte_fallback.encode("the", add_special_tokens=False), 2]
    assert byte_fallback.decode(ids) == "the"
    assert byte_fallback.decode(ids, skip_special_tokens=False) == byte_fallback.vocabulary.backend.decode(
        ids, skip_special_tokens=False
    )


def test_longest_token(byte_fallback: Tokenizer, smollm2: Tokenizer) -> None:
    assert byte_fallback.longest_token == len("<unk>")
    text = "".join(TEXTS)
    ids = smollm2.encode(text, add_special_tokens=False)
    assert len(text.encode()) <= len(ids) * smollm2.longest_token
    assert smollm2.longest_token == max(len(smollm2.token_bytes(i)) for i in range(smollm2.vocab_size))


def test_encoding_lets_other_threads_run(smollm2: Tokenizer) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 15_000
    times = []
    encoding = threading.Thread(target=smollm2.encode, args=(text,), kwargs={"add_special_tokens": False})
    begin = time.perf_counter()
    encoding.start()
    while encoding.is_alive():
        times.append(time.perf_counter())
        time.sleep(0.002)
    took = time.perf_counter() - begin
    longest = max(after - before for before, after in pairwise([begin, *times, begin + took]))
    assert longest < took / 2, "encoding held the interpreter"


def test_a_prompt_gets_one_bos(tmp_path: Path) -> None:
    backend = byte_fallback_backend()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode_prompt("the").count(1) == 1
    assert tokenizer.encode_prompt("<s>the").count(1) == 1
    assert tokenizer.encode_prompt("<s>the")[0] == 1


def test_stored_truncation_and_padding_are_off(tmp_path: Path) -> None:
    backend = byte_fallback_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_dir(tmp_path).encode("abcdefgh", add_special_tokens=False)) == 9


def test_missing_damaged_and_unsupported_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has none of tokenizer\.json, tokenizer\.model, qwen\.tiktoken"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    backend = byte_fallback_backend()
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="decoder 'WordPiece'"):
        Tokenizer.from_dir(tmp_path)
    byte_fallback_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("vocabulary", ["smollm2", "byte_fallback"])
@pytest.mark.parametrize("word", ["fox", " fox", "the fox"])
def test_a_word_is_known_as_it_stands_in_a_text(vocabulary: str, word: str, request: pytest.FixtureRequest) -> None:
    """After a space, and after what is none: one of its runs ends the ids of each text that ends with it."""
    tokenizer: Tokenizer = request.getfixturevalue(vocabulary)
    runs = tokenizer.encode_word(word)
    assert len(runs) == 2 and all(tokenizer.decode([*tokenizer.encode_continuation("a"), *run]) for run in runs)
    for text in (f"a {word.strip()}", f"a. the {word.strip()}", f"a\n{word.strip()}"):
        ids = tokenizer.encode_continuation(text)
        assert any(ids[-len(run) :] == run for run in runs), f"{text!r} is {ids}, the runs are {runs}"
