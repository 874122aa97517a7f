"""What graphs hold, run on a CPU: rows of padding change nothing, and nothing is read from the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.gpu_steps import decode, fill_cache, prefill, prefills, sequences
from tests.tolerances import assert_close
from tritonmind.engine import model_runner
from tritonmind.engine.cuda_graph import StepGraphs
from tritonmind.engine.decode_batch import FROM_DEVICE
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.engine.scheduler_output import ScheduledSequence, SchedulerOutput
from tritonmind.messages import MAX_LOGPROBS
from tritonmind.workspace import Workspace

NUM_BLOCKS = 30


@pytest.fixture
def runner(workspace: Path) -> ModelRunner:
    source = Workspace.open(workspace)
    config = source.engine_config(
        device="cpu", max_num_seqs=8, cache_max_entry_count=NUM_BLOCKS, max_num_batched_tokens=256, num_threads=1
    )
    runner = ModelRunner(source, config)
    fill_cache(runner)
    return runner


@torch.inference_mode()
@pytest.mark.parametrize("num_padding", [0, 3])
def test_a_replay_with_padding_equals_the_step(runner: ModelRunner, num_padding: int) -> None:
    """After a larger step has left its rows behind; the last tokens of two rows are known to the device only."""
    runner.execute(decode(sequences([90] * 8, NUM_BLOCKS))).wait()
    seqs = sequences([1, 64, 65, 200, 130], NUM_BLOCKS)
    runner.execute(prefills(prefill(seqs[:2], 1))).wait()  # enters them, and draws
    output = decode(seqs)
    output.decodes.token_ids[:2] = -1
    output.decodes.fresh[:] = [2, 3, 4]
    drawn = runner.execute(output).wait().token_ids
    expected = runner.logits[:5].clone()
    written = [(cache.k.clone(), cache.v.clone()) for cache in runner.kv_caches]

    # Once more as a graph would: the same staged step, which must not have changed, in a larger bucket.
    runner._sampler.last_token_ids[torch.tensor([seq.slot for seq in seqs[:2]])] = _inputs_of(runner, 2)
    runner.logits.fill_(float("nan"))
    last_token_ids = runner._sampler.last_token_ids
    last_token_ids[5:] = 11  # of slots that the step has no rows of
    runner._decode_greedily(5 + num_padding, 200)
    assert_close(runner.logits[:5], expected)
    assert runner.logits[:5].argmax(1).tolist() == runner._sampler.token_ids[:5].tolist() == drawn
    assert last_token_ids.tolist() == drawn + [11] * 3, "a slot has another's draw, or padding drew"
    assert runner.logits[: 5 + num_padding].isfinite().all(), "padding read what nobody wrote"
    for cache, (k, v) in zip(runner.kv_caches, written, strict=True):
        assert_close(cache.k, k)
        assert_close(cache.v, v)
    mixed = SchedulerOutput(decode(seqs[2:]).decodes, prefill(seqs[:1], 1))
    runner.execute(mixed).wait()
    assert_close(runner.logits[:3], expected[2:])


class Replays:
    """A GraphSet that was captured by remembering its function."""

    def __init__(self, function: Callable[[int], object]) -> None:
        self.replay = function


def _capture(runner: ModelRunner, max_context_len: int) -> None:
    functions: tuple[Callable[[int], object], ...] = (
        lambda num_rows: runner._decode_greedily(num_rows, max_context_len),
        lambda num_rows: runner._decode(num_rows, max_context_len),
        lambda num_rows: runner._sampler.sample(runner.logits[:num_rows], greedy=False),
        lambda num_tokens: runner._prefill(num_tokens, max_context_len),
    )
    runner._graphs = StepGraphs(*map(Replays, functions))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.9, "top_k": 20}, {"logit_bias": [(7, 4.0)], "bad_words": [[6]]}, {"num_logprobs": 2}],
    ids=["greedy", "sampling", "edits", "logprobs"],
)
def test_a_step_out_of_graphs_equals_the_step(runner: ModelRunner, options: dict[str, Any]) -> None:
    output = decode(sequences([1, 64, 65, 200, 130], NUM_BLOCKS, **options))
    expected = runner.execute(output).wait()
    logits = runner.logits[:5].nan_to_num(neginf=-10)
    runner.logits.fill_(float("nan"))
    _capture(runner, 200)
    result = runner.execute(output).wait()
    assert result.token_ids == expected.token_ids
    assert_close(runner.logits[:5].nan_to_num(nan=1e3, neginf=-10), logits)
    assert (result.logprobs is None) == ("num_logprobs" not in options)


@pytest.mark.parametrize("options", [{}, {"logit_bias": [(7, 4.0)]}], ids=["greedy", "edits"])
def test_a_step_with_prompts_out_of_a_graph_equals_the_step(runner: ModelRunner, options: dict[str, Any]) -> None:
    """Decodes, a whole prompt, and chunks of which one draws nothing, after a larger step has left its rows behind."""
    runner.execute(prefills(prefill(sequences([20] * 8, NUM_BLOCKS), 20))).wait()
    seqs = sequences([64, 130, 1, 70, 90, 30], NUM_BLOCKS, **options)
    chunks = [*prefill(seqs[3:4], 70), *prefill(seqs[4:5], 11), ScheduledSequence(seqs[5], 0, 17, False)]
    output = SchedulerOutput(decode(seqs[:3]).decodes, chunks)
    before = [(cache.k.clone(), cache.v.clone()) for cache in runner.kv_caches]
    drawn = runner.execute(output).wait().token_ids
    expected = runner.logits[:5].clone()
    written = [(cache.k.clone(), cache.v.clone()) for cache in runner.kv_caches]

    with torch.inference_mode():
        for cache, (k, v) in zip(runner.kv_caches, before, strict=True):
            cache.k.copy_(k)
            cache.v.copy_(v)
    runner.logits.fill_(float("nan"))
    _capture(runner, 130)
    assert runner._padded_size(output) == 128, "101 tokens"
    assert runner.execute(output).wait().token_ids == drawn
    assert_close(runner.logits[:5], expected)
    assert runner.logits.isfinite().all(), "padding read what nobody wrote"
    for cache, (k, v) in zip(runner.kv_caches, written, strict=True):
        assert_close(cache.k, k)
        assert_close(cache.v, v)


def test_a_bad_word_is_known_by_the_token_before_the_draw(runner: ModelRunner) -> None:
    """Only the device has it: a draw before the logits are changed would take its place."""
    [seq] = sequences([65], NUM_BLOCKS)
    last = seq.token_ids[-1]
    [likeliest] = runner.execute(decode([seq])).wait().token_ids
    seq.request = msgspec.structs.replace(seq.request, bad_words=[[last, likeliest]])
    seq.admission = -2  # enters again
    output = decode([seq])
    output.decodes.token_ids[0] = FROM_DEVICE
    runner._sampler.last_token_ids[seq.slot] = seq.token_ids.pop()
    _capture(runner, 65)
    [token_id] = runner.execute(output).wait().token_ids
    assert runner.logits[0, likeliest] == float("-inf") and token_id != likeliest


def test_the_warm_up_takes_the_memory_that_log_probabilities_of_prompts_take(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has not taken, a step beside a full cache may lack."""
    num_rows: list[int] = []

    def watched(logits: torch.Tensor, token_ids: torch.Tensor, *, num_top: int) -> None:
        assert num_top == MAX_LOGPROBS and len(logits) == len(token_ids)
        num_rows.append(len(logits))

    monkeypatch.setattr(model_runner, "token_logprobs", watched)
    monkeypatch.setattr(runner.model.output, "row_variants", lambda max_rows: [max_rows])
    with torch.inference_mode():
        runner._warm_up_options(8)
    assert num_rows == [8, model_runner.PROMPT_LOGPROB_ROWS]


def _inputs_of(runner: ModelRunner, num_rows: int) -> torch.Tensor:
    """What the device took for the tokens that only it knew, before the draw took their place."""
    return runner._builder._tokens.token_ids[:num_rows].clone()
