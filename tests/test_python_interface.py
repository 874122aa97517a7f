"""`pipeline` and LMDeploy's `turbomind` over a tiny model; their examples over a real one."""

from __future__ import annotations

import asyncio
import doctest
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import tritonmind
from tests.checkpoints import make_llama_checkpoint
from tests.workspaces import tiny_workspace
from tritonmind import SamplingParams, hub, pipelines, turbomind
from tritonmind import turbomind as tm
from tritonmind.errors import BusyError, ConfigError, InvalidRequestError, NotFoundError
from tritonmind.pipelines import Pipeline

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    workspace = tiny_workspace(tmp_path_factory.mktemp("python"))
    with tritonmind.pipeline(
        str(workspace), in_process=True, device="cpu", cache_max_entry_count=64, num_threads=1
    ) as pipe:
        yield pipe
        assert pipe.engine.stats().num_running == 0
        pipe.engine.check_integrity()


@pytest.fixture
def tm_model(pipe: Pipeline) -> tm.TurboMind:
    return tm.TurboMind(pipe)


@pytest.mark.parametrize("module", [pipelines, turbomind], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: object, smollm2_workspace: Path) -> None:
    results = doctest.testmod(module, extraglobs={"MODEL": str(smollm2_workspace)})  # type: ignore[arg-type]
    assert results.attempted > 3 and not results.failed


def test_a_text_goes_through_the_chat_template(pipe: Pipeline) -> None:
    answer = pipe("hi", GREEDY)
    assert answer.token_ids == pipe.generate([[{"role": "user", "content": "hi"}]], GREEDY)[0].token_ids
    assert pipe("hi", GREEDY, do_preprocess=False).token_ids == pipe.generate(["hi"], GREEDY)[0].token_ids
    assert answer.num_prompt_tokens > pipe("hi", GREEDY, do_preprocess=False).num_prompt_tokens


def test_one_prompt_has_one_answer_and_a_list_a_list(pipe: Pipeline) -> None:
    ids = [40, 41, 42]
    message = [{"role": "user", "content": "hi"}]
    many = pipe(["hi", ids, message], GREEDY)
    for prompt, answer in zip(["hi", ids, message], many, strict=True):
        assert pipe(prompt, GREEDY) == answer
    assert pipe([], GREEDY) == []
    two = pipe("hi", SamplingParams(n=2, max_tokens=3))
    assert [len(answer.token_ids) for answer in two] == [3, 3]
    for wrong in (7, ["a", 7], [b"a"]):
        with pytest.raises(InvalidRequestError, match=r"prompts?="):
            pipe(wrong)


def test_async_is_the_same(pipe: Pipeline) -> None:
    async def ask() -> None:
        whole, single = await asyncio.gather(pipe.infer_async(["a", "b"], GREEDY), pipe.infer_async("c", GREEDY))
        assert [whole, single] == [pipe(["a", "b"], GREEDY), pipe("c", GREEDY)]
        deltas = [delta async for delta in pipe.stream_async("a", GREEDY)]
        assert "".join(delta.text for delta in deltas) == whole[0].text
        assert len(deltas) > 2
        assert (await pipe.chat_async("a", None, GREEDY)).response == whole[0]

    asyncio.run(ask())
    assert "".join(delta.text for delta in pipe.stream("a", GREEDY)) == pipe("a", GREEDY).text


def test_a_cancelled_task_leaves_nothing_running(pipe: Pipeline) -> None:
    endless = SamplingParams(max_tokens=400, ignore_eos=True)

    async def ask_and_leave() -> None:
        task = asyncio.create_task(pipe.infer_async(["a", "b"], endless))
        stream = pipe.stream_async("c", endless)
        await anext(stream)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        await stream.aclose()

    asyncio.run(ask_and_leave())
    while pipe.engine.stats().num_running or pipe.engine.stats().num_waiting:
        pass


def test_a_conversation_is_what_was_said(pipe: Pipeline) -> None:
    first = pipe.chat("one", gen_config=GREEDY)
    second = pipe.chat("two", first, GREEDY)
    assert second.response is not None
    whole = pipe([*first.messages, {"role": "user", "content": "two"}], GREEDY)
    assert second.response.token_ids == whole.token_ids
    assert len(first.messages) == 2 and len(second.messages) == 4


def test_turbomind_answers_with_all_ids_so_far(tm_model: tm.TurboMind, pipe: Pipeline) -> None:
    ids = tm_model.tokenizer.encode("hello")
    assert ids == pipe.tokenizer.encode_prompt("hello")
    generator = tm_model.create_instance()
    options = {"request_output_len": 12, "temperature": 0.0, "ignore_eos": True}
    expected = pipe(ids, GREEDY)
    (outputs,) = generator.stream_infer(0, [ids], **options)
    ((res, tokens),) = outputs
    assert res.tolist() == expected.token_ids and tokens == 12
    assert tm_model.tokenizer.decode(res.tolist()) == expected.text
    steps = [outputs[0] for outputs in generator.stream_infer(0, ids, stream_output=True, **options)]
    assert len(steps) > 2
    for before, after in itertools.pairwise(steps):
        assert after[0][: before[1]].tolist() == before[0].tolist() and before[1] < after[1]
    rows = [ids, ids[:3]]
    (both,) = generator.stream_infer([1, 2], rows, **options)
    assert [res.tolist() for res, _ in both] == [answer.token_ids for answer in pipe(rows, GREEDY)]


def test_turbomind_remembers_a_session(tm_model: tm.TurboMind, pipe: Pipeline) -> None:
    generator = tm_model.create_instance()
    first, second = [40, 41, 42], [50, 51]
    options = {"request_output_len": 6, "temperature": 0.0, "ignore_eos": True}
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)

    def ask(ids: list[int], **more: object) -> list[int]:
        (outputs,) = generator.stream_infer(7, ids, **options, **more)
        return outputs[0][0].tolist()

    answer = ask(first)
    both = [*first, *answer, *second]
    assert ask(second, sequence_start=False) == pipe(both, params).token_ids
    # From the end of the first prompt, the answer to which is given up.
    assert ask(second, sequence_start=False, step=3, sequence_end=True) == pipe([*first, *second], params).token_ids
    with pytest.raises(NotFoundError):
        ask(second, sequence_start=False)

    async def again() -> list[int]:
        all_outputs = [outputs async for outputs in generator.async_stream_infer(8, first, **options)]
        return all_outputs[-1][0][0].tolist()

    assert asyncio.run(again()) == answer
    list(generator.stream_infer(8, first, stop=True))
    with pytest.raises(NotFoundError):
        list(generator.stream_infer(8, second, sequence_start=False))


def test_turbomind_leaves_off_what_ended_an_answer(tm_model: tm.TurboMind, pipe: Pipeline) -> None:
    tokens = pipe([40, 41, 42], GREEDY).token_ids
    eos = next(token for token in tokens if tokens.index(token) > 2)
    model = tm_model.llm.model
    try:
        object.__setattr__(model, "eos_token_ids", (eos,))
        (outputs,) = tm_model.create_instance().stream_infer(9, [40, 41, 42], temperature=0.0)
    finally:
        object.__setattr__(model, "eos_token_ids", (pipe.tokenizer.eos_token_id,))
    assert outputs[0][0].tolist() == tokens[: tokens.index(eos)]


def test_turbomind_refuses_what_it_cannot_do(tm_model: tm.TurboMind) -> None:
    generator = tm_model.create_instance()
    with pytest.raises(InvalidRequestError, match="session_id"):
        list(generator.stream_infer(1, [[5, 6], [7]]))
    with pytest.raises(InvalidRequestError, match="input_ids"):
        list(generator.stream_infer(1, []))
    with pytest.raises(InvalidRequestError, match="top_p"):
        list(generator.stream_infer(1, [5, 6], top_p=2.0))
    running = generator.stream_infer(3, [5, 6], ignore_eos=True, stream_output=True)
    next(running)
    with pytest.raises(BusyError):
        list(generator.stream_infer(3, [5, 6]))
    running.close()
    assert len(list(generator.stream_infer(3, [5], request_output_len=2, sequence_start=False))) == 1
    path = "random:tiny"
    with pytest.raises(ConfigError, match="model_format='awq'"):
        tm.TurboMind.from_pretrained(path, model_format="awq")
    with pytest.raises(ConfigError, match="group_size=64"):
        tm.TurboMind.from_pretrained(path, group_size=64)


def test_turbomind_takes_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_llama_checkpoint(tmp_path)
    monkeypatch.setattr(hub, "_download", lambda *_: tmp_path)
    options = {"in_process": True, "device": "cpu", "cache_max_entry_count": 64, "num_threads": 1}
    with tm.TurboMind.from_pretrained("someone/model", model_format="hf", **options) as tm_model:
        assert len(list(tm_model.create_instance().stream_infer(0, [5, 6], request_output_len=2))) == 1


def test_templates_of_turbomind(tm_model: tm.TurboMind, pipe: Pipeline) -> None:
    assert pipe.chat_template is not None
    said = [{"role": "user", "content": "hi"}]
    assert tm_model.model.get_prompt("hi") == pipe.chat_template.render(said)
    later = tm_model.model.get_prompt("hi", sequence_start=False)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *said]
    assert pipe.chat_template.render(talk).endswith("b" + later)
    assert tm_model.model.messages2prompt(talk) == pipe.chat_template.render(talk)
    assert tm_model.model.messages2prompt("hi") == tm_model.model.get_prompt("hi")
    assert tm_model.session_len == pipe.engine.info.max_model_len
    assert tm_model.eos_id == pipe.model.eos_token_ids[0]
