"""The Python API over a tiny model: batches, streams, stop strings, and what is left after an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tritonmind.engine.llm import LLM
from tritonmind.errors import InvalidRequestError, UnavailableError
from tritonmind.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(workspace: Path) -> Iterator[LLM]:
    with LLM(str(workspace), in_process=True, device="cpu", cache_max_entry_count=64) as llm:
        yield llm
        llm.engine.check_integrity()


def wait_until_idle(llm: LLM) -> None:
    while llm.engine.stats().num_running or llm.engine.stats().num_waiting:
        pass


def test_a_stream_says_what_generate_says(llm: LLM) -> None:
    prompts = ["one", [40, 41, 42], [{"role": "user", "content": "hi"}]]
    whole = llm.generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, whole, strict=True):
        deltas = list(llm.stream_infer(prompt, GREEDY))
        assert "".join(delta.text for delta in deltas) == completion.text
        assert [i for delta in deltas for i in delta.token_ids] == completion.token_ids
        assert completion.finish_reason == deltas[-1].finish_reason == "length"
        assert len(completion.token_ids) == 24
        assert all(delta.num_prompt_tokens == completion.num_prompt_tokens for delta in deltas)


def test_a_stream_counts_what_the_prefix_cache_had(llm: LLM) -> None:
    llm.engine.reset_prefix_cache()
    block_size = llm.engine.info.block_size
    prompt = [5 + i % 7 for i in range(block_size + 3)]
    for num_cached_tokens in (0, block_size):
        deltas = list(llm.stream_infer(prompt, GREEDY))
        assert {delta.num_cached_tokens for delta in deltas} == {num_cached_tokens}


def test_a_stop_string_ends_its_own_answer_only(llm: LLM) -> None:
    first, second = llm.generate(["a", "b"], GREEDY)
    stop = next(c for i, c in enumerate(first.text) if i > 3 and c not in first.text[:i] + "\ufffd")
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, stop=(stop,))
    stopped, other = llm.generate(["a", "b"], params)
    assert stopped.text == first.text[: first.text.index(stop)] and stopped.finish_reason == "stop"
    assert other.text == second.text.partition(stop)[0]
    wait_until_idle(llm)


def test_a_bad_prompt_leaves_nothing_running(llm: LLM) -> None:
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    with pytest.raises(InvalidRequestError, match="session_len"):
        llm.generate(["good", [5] * 1000], long)
    wait_until_idle(llm)
    assert len(llm.generate(["good"], GREEDY)[0].token_ids) == 24


def test_leaving_a_stream_early_cancels_it(llm: LLM) -> None:
    for _ in llm.stream_infer("long", SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)):
        break
    wait_until_idle(llm)


def test_a_closed_engine_is_unavailable(workspace: Path) -> None:
    llm = LLM(str(workspace), in_process=True, device="cpu", cache_max_entry_count=64)
    llm.close()
    with pytest.raises(UnavailableError, match="shut down"):
        llm.generate(["x"], GREEDY)


def test_bf16_on_the_cpu_is_close_to_fp32(workspace: Path) -> None:
    with LLM(str(workspace), in_process=True, device="cpu", dtype="bf16", cache_max_entry_count=64) as llm:
        assert llm.engine.info.dtype == "bfloat16"
        assert len(llm.generate([[5, 6, 7]], GREEDY)[0].token_ids) == 24
