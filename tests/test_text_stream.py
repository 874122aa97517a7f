"""Stop strings: the same text and end however the tokens come, and never more held back than needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import make_tokenizer
from tritonmind.text_stream import StopMatcher, TextDelta, TextStream
from tritonmind.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory, vocab=320)
    return Tokenizer.from_dir(directory)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """By definition: the earliest end of any stop string in the text, the longest stop string that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


def longest_hold(text: str, stops: list[str]) -> int:
    """By definition: the longest end of the text that is a proper beginning of a stop string."""
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


few_letters = st.text(alphabet="abc", min_size=1, max_size=5)


@settings(max_examples=500, deadline=None)
@given(text=st.text(alphabet="abcd", max_size=30), stops=st.lists(few_letters, min_size=1, max_size=4))
def test_matcher_agrees_with_the_definition(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    for end, character in enumerate(text, start=1):
        found = matcher.push(character)
        expected = first_stop(text[:end], stops)
        if found is not None:
            assert expected == (end, found)
            return
        assert expected is None
        assert matcher.held == longest_hold(text[:end], stops)


def run(stream: TextStream, chunks: list[list[int]]) -> list[TextDelta]:
    deltas = []
    for index, chunk in enumerate(chunks):
        deltas.append(stream.push(chunk, "length" if index == len(chunks) - 1 else None))
        if stream.finished:
            break
    return deltas


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abcé 😀", min_size=1, max_size=30),
    stops=st.lists(st.text(alphabet="abé😀", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_result_does_not_depend_on_how_tokens_come(
    tokenizer: Tokenizer, text: str, stops: list[str], data: st.DataObject
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)))) | {len(ids)})
    chunks = [ids[begin:end] for begin, end in zip([0, *cuts], cuts, strict=False)]
    deltas = run(TextStream(tokenizer, stops), chunks)
    shown = "".join(delta.text for delta in deltas)
    counted = [token_id for delta in deltas for token_id in delta.token_ids]
    found = first_stop(text, stops)
    if found is None:
        assert (shown, counted) == (text, ids)
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("length", None)
    else:
        end, stop = found
        assert shown == text[: end - len(stop)]
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
        # The tokens end with the one that completed the stop string.
        assert stop in tokenizer.decode(counted)
        assert first_stop(tokenizer.decode(counted[:-1]).rstrip("\ufffd"), stops) is None
    assert all(delta.num_tokens == len(delta.token_ids) for delta in deltas)
    assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_possible_stop_is_held_and_released(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["STOP"])
    steps = [(piece, stream.push(tokenizer.encode(piece, add_special_tokens=False)).text) for piece in ("aS", "T", "a")]
    assert steps == [("aS", "a"), ("T", ""), ("a", "STa")]
    assert stream.push(tokenizer.encode("ST", add_special_tokens=False)).text == ""
    assert stream.push([], "length") == TextDelta("ST", 0, [], "length", None)


def test_token_that_ends_the_answer_counts_and_has_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab.", add_special_tokens=False)
    stream = TextStream(tokenizer)
    delta = stream.push(ids, "stop", stop_token_id=ids[-1])
    assert delta == TextDelta("ab", len(ids), ids, "stop", str(ids[-1]))


def test_stop_string_wins_over_the_engine_s_reason(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a!b", add_special_tokens=False)
    delta = TextStream(tokenizer, ["!"]).push([*ids, 2], "stop", stop_token_id=2)
    assert (delta.text, delta.num_tokens, delta.stop_reason) == ("a", 2, "!")


def test_incomplete_character_shows_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é", add_special_tokens=False)[:1]
    stream = TextStream(tokenizer)
    if tokenizer.decode(ids) == "é":
        pytest.fail("the tokenizer has learned this character: take a rarer one")
    assert stream.push(ids).text == ""
    assert stream.push([], "length").text == "\ufffd"


def test_a_finished_stream_takes_no_more(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    stream.push([], "length")
    with pytest.raises(AssertionError):
        stream.push([5])


def test_siblings_share_their_stop_strings_and_nothing_else(tokenizer: Tokenizer) -> None:
    first = TextStream(tokenizer, ["STOP"], include_stop=True)
    ids = tokenizer.encode("aST", add_special_tokens=False)
    assert first.push(ids).text == "a"
    second = first.sibling()
    assert second.push(tokenizer.encode("OP", add_special_tokens=False)).text == "OP", (
        "the first one's ST is not its own"
    )
    assert first.push(tokenizer.encode("OPb", add_special_tokens=False)[:2]).text.startswith("STOP")
    assert second.push(tokenizer.encode(" xSTOPy", add_special_tokens=False)).text == " xSTOP"
    assert second.finished


@pytest.mark.parametrize("include_stop", [False, True])
def test_what_ended_the_answer_is_in_the_text_if_asked_for(tokenizer: Tokenizer, include_stop: bool) -> None:
    stream = TextStream(tokenizer, ["b"], include_stop=include_stop)
    delta = stream.push(tokenizer.encode("abc", add_special_tokens=False))
    assert delta.text == ("ab" if include_stop else "a") and delta.stop_reason == "b"
    (stop_id,) = tokenizer.encode("c", add_special_tokens=False)
    stream = TextStream(tokenizer, include_stop=include_stop)
    delta = stream.push([*tokenizer.encode("a", add_special_tokens=False), stop_id], "stop", stop_token_id=stop_id)
    assert delta.text == ("ac" if include_stop else "a")


def test_special_tokens_have_text_if_asked_for(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_token_ids)
    ids = [*tokenizer.encode("a", add_special_tokens=False), special]
    assert TextStream(tokenizer).push(ids, "length").text == "a"
    shown = TextStream(tokenizer, skip_special_tokens=False).push(ids, "length").text
    assert shown == tokenizer.decode(ids, skip_special_tokens=False) != "a"
