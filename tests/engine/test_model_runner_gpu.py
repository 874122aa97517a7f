"""The runner on a card: graphs against eager steps, rows against batches, no waits, no compiles, no lack of memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_llama_checkpoint
from tests.gpu_steps import decode, fill_cache, prefill, prefills, sequences
from tests.tolerances import assert_close
from tests.workspaces import convert
from tritonmind.engine.core import EngineCore
from tritonmind.engine.llm import LLM
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.engine.scheduler_output import SchedulerOutput
from tritonmind.messages import EngineRequest
from tritonmind.sampling_params import SamplingParams
from tritonmind.workspace import Workspace

pytestmark = pytest.mark.gpu

NUM_BLOCKS = 100
MAX_NUM_SEQS = 11
EXTRAS: dict[str, Any] = {
    "logit_bias": [(7, 1.5)],
    "min_tokens": 3,
    "stop_token_ids": [4, 5],
    "bad_words": [[6], [8, 9]],
    "num_logprobs": 3,
    "num_prompt_logprobs": 2,
}
EDITS = {"logit_bias": [(7, 4.0)], "bad_words": [[6], [8, 9]]}
SAMPLING = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    directory = tmp_path_factory.mktemp("runner")
    make_llama_checkpoint(
        directory / "checkpoint", num_heads=4, num_kv_heads=2, head_dim=64, hidden=256, dtype=torch.float16
    )
    return Workspace.open(convert(directory / "checkpoint", directory / "workspace"))


def make_runner(workspace: Workspace, **overrides: object) -> ModelRunner:
    config = workspace.engine_config(
        device="cuda",
        max_num_seqs=MAX_NUM_SEQS,
        cache_max_entry_count=NUM_BLOCKS,
        max_num_batched_tokens=256,
        **overrides,
    )
    runner = ModelRunner(workspace, config)
    fill_cache(runner)
    return runner


@pytest.fixture(scope="module")
def runner(workspace: Workspace) -> ModelRunner:
    return make_runner(workspace)


@pytest.fixture(scope="module")
def eager(workspace: Workspace) -> ModelRunner:
    return make_runner(workspace, enforce_eager=True)


@torch.inference_mode()
def copy_cache(source: ModelRunner, target: ModelRunner) -> None:
    for mine, theirs in zip(source.kv_caches, target.kv_caches, strict=True):
        theirs.k.copy_(mine.k)
        theirs.v.copy_(mine.v)


def run(runner: ModelRunner, output: SchedulerOutput) -> tuple[torch.Tensor, list[int]]:
    token_ids = runner.execute(output).wait().token_ids
    return runner.logits[: len(token_ids)].clone(), token_ids


@pytest.mark.parametrize("num_decodes", [1, 3, 8, 11])
@pytest.mark.parametrize("options", [{}, SAMPLING, EDITS], ids=["greedy", "sampling", "edits"])
def test_graph_replay_equals_eager(
    runner: ModelRunner, eager: ModelRunner, num_decodes: int, options: dict[str, Any]
) -> None:
    """Batch sizes on and between the buckets, after a larger batch has left its rows behind."""
    run(runner, decode(sequences([90] * MAX_NUM_SEQS, NUM_BLOCKS)))
    copy_cache(runner, eager)
    lengths = torch.randint(1, 500, (num_decodes,)).tolist()
    output = decode(sequences(lengths, NUM_BLOCKS, **options))
    replayed, token_ids = run(runner, output)
    expected, expected_ids = run(eager, output)
    # Not to the bit: a matrix product of other rows, or captured, may use another algorithm.
    allowed = expected.isfinite()
    assert torch.equal(replayed.isfinite(), allowed) and allowed[:, 6].any() == (options is not EDITS)
    assert_close(replayed[allowed], expected[allowed])
    for row, token_id, other in zip(range(num_decodes), token_ids, expected_ids, strict=True):
        if torch.equal(replayed[row], expected[row]):
            assert token_id == other
        if options is not SAMPLING:
            assert replayed[row, token_id] == replayed[row].max() and expected[row, other] == expected[row].max()


@pytest.mark.parametrize("options", [{}, SAMPLING, EDITS], ids=["greedy", "sampling", "edits"])
@pytest.mark.parametrize(("num_decodes", "chunks"), [(0, [3]), (1, [64]), (5, [70, 1, 33]), (10, [246])], ids=str)
def test_graph_of_a_step_with_prompts_equals_eager(
    runner: ModelRunner, eager: ModelRunner, num_decodes: int, chunks: list[int], options: dict[str, Any]
) -> None:
    """Numbers of tokens on and between the buckets, prompts with and without tokens before."""
    run(runner, prefills(prefill(sequences([20] * MAX_NUM_SEQS, NUM_BLOCKS), 20)))
    copy_cache(runner, eager)
    lengths = [*[200] * num_decodes, *(max(chunk, 90) for chunk in chunks)]
    seqs = sequences(lengths, NUM_BLOCKS, **options)
    items = [item for seq, chunk in zip(seqs[num_decodes:], chunks, strict=True) for item in prefill([seq], chunk)]
    output = SchedulerOutput(decode(seqs[:num_decodes]).decodes, items)
    assert runner._padded_size(output) and not eager._padded_size(output)
    replayed, token_ids = run(runner, output)
    expected, expected_ids = run(eager, output)
    allowed = expected.isfinite()
    assert torch.equal(replayed.isfinite(), allowed)
    assert_close(replayed[allowed], expected[allowed])
    for row, token_id, other in zip(range(len(seqs)), token_ids, expected_ids, strict=True):
        if options is not SAMPLING:
            assert replayed[row, token_id] == replayed[row].max() and expected[row, other] == expected[row].max()
    for mine, theirs in zip(runner.kv_caches, eager.kv_caches, strict=True):
        assert_close(mine.k, theirs.k)
        assert_close(mine.v, theirs.v)


@pytest.mark.parametrize("with_prompts", [False, True])
def test_a_row_alone_equals_the_row_in_a_batch(runner: ModelRunner, with_prompts: bool) -> None:
    """Within the tolerance: matrix products and the split of attention depend on the batch's size."""
    before = [(cache.k.clone(), cache.v.clone()) for cache in runner.kv_caches]
    seqs = sequences([1, 64, 65, 200, 333, 480, 17, 128], NUM_BLOCKS)
    output = decode(seqs[:6])
    if with_prompts:
        output = SchedulerOutput(output.decodes, prefill(seqs[6:], 17))
    together, token_ids = run(runner, output)
    assert all(logits[token_id] == logits.max() for logits, token_id in zip(together, token_ids, strict=True))
    for row, item in enumerate(output.items):
        with torch.inference_mode():
            for cache, (k, v) in zip(runner.kv_caches, before, strict=True):
                cache.k.copy_(k)
                cache.v.copy_(v)
        is_prefill = item.num_new_tokens > 1
        alone, _ = run(runner, prefills([item]) if is_prefill else decode([item.seq]))
        assert_close(alone[0], together[row])


def test_steps_wait_for_nothing(runner: ModelRunner) -> None:
    """Every kind of step, with sequences that enter with penalties; PyTorch raises at anything that synchronises."""
    seqs = sequences([40, 64, 65, 300, 17, 128], NUM_BLOCKS, **SAMPLING, **EXTRAS)
    more = sequences([33, 99], NUM_BLOCKS)
    outputs = [
        prefills(prefill(seqs[:3], 30)),
        SchedulerOutput(decode(seqs[3:]).decodes, prefill(seqs[:1], 5)),
        decode(seqs),
        decode(more),
    ]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        handles = [runner.execute(output) for output in outputs[:2]]
        torch.cuda.set_sync_debug_mode("default")
        for handle in handles:
            handle.wait()
        torch.cuda.set_sync_debug_mode("error")
        handles = [runner.execute(output) for output in outputs[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(handle.wait().token_ids) for handle in handles] == [6, 2]


def test_nothing_compiles_after_ready(workspace: Workspace) -> None:
    """Random loads through the whole engine: lengths, batch sizes, sampling options, prefix hits, preemptions."""
    config = workspace.engine_config(
        device="cuda", max_num_seqs=13, cache_max_entry_count=14, max_num_batched_tokens=200, session_len=384
    )
    core = EngineCore(workspace, config)
    draw = random.Random(int(torch.randint(1 << 30, ()).item()))
    for number in range(120):
        options = draw.choice(({}, SAMPLING, {"temperature": 1.0}, {"presence_penalty": 0.5}, EXTRAS))
        core.add(
            EngineRequest(
                request_id=number,
                prompt_token_ids=[draw.randrange(3, 300) for _ in range(draw.choice((1, 2, 15, 17, 63, 100, 300)))],
                max_tokens=draw.randrange(1, 80),
                seed=number,
                **{"stop_token_ids": [], "temperature": 0.0, "top_k": 0, "top_p": 1.0, **options},
            )
        )
    num_finished = 0
    while core.has_work:
        num_finished += sum(output.finish_reason is not None for output in core.step())
    assert num_finished == 120
    core.check_integrity()
    assert core.stats().num_preemptions > 0
    assert core.stats().num_jit_compiles == 0


def test_the_alarm_counts_a_variant_that_nobody_warmed(runner: ModelRunner) -> None:
    from tritonmind.kernels import rms_norm

    before = runner.jit_alarm.num_compiles
    runner.jit_alarm.arm(runner.device)  # another engine's may have been armed since
    x = torch.ones(2, 1234, dtype=torch.float16, device="cuda")
    rms_norm(x, x[0], eps=0.1)
    assert runner.jit_alarm.num_compiles == before + 1


def test_a_full_cache_is_not_out_of_memory(tmp_path: Path) -> None:
    """Nearly all memory for the cache, then more tokens than it holds, in steps of the largest size."""
    make_llama_checkpoint(
        tmp_path / "checkpoint",
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        hidden=512,
        num_layers=8,
        max_position_embeddings=2048,
        dtype=torch.float16,
    )
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace")
    torch.cuda.empty_cache()
    hog = torch.empty(max(0, torch.cuda.mem_get_info()[0] - (8 << 30)), dtype=torch.uint8, device="cuda")
    prompts = [torch.randint(3, 300, (1500,)).tolist() for _ in range(96)]
    with LLM(
        str(path),
        in_process=True,
        device="cuda",
        cache_max_entry_count=0.99,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        session_len=2048,
    ) as llm:
        info = llm.engine.info
        assert info.num_blocks * info.block_size < 64 * 2048, "the load must not fit"
        torch.cuda.reset_accumulated_memory_stats()
        answers = llm.generate(
            prompts, SamplingParams(max_tokens=500, temperature=0.9, top_p=0.9, repetition_penalty=1.1, ignore_eos=True)
        )
        stats = llm.engine.stats()
        llm.engine.check_integrity()
    del hog
    torch.cuda.empty_cache()  # tests after this one start processes of their own on the card
    assert [len(answer.token_ids) for answer in answers] == [500] * 96
    assert stats.num_preemptions > 0, "the cache was never full"
    memory = torch.cuda.memory_stats()
    assert memory["num_ooms"] == 0 and memory["num_alloc_retries"] == 0


@pytest.mark.parametrize(
    "overrides",
    [
        {"max_num_seqs": 1, "max_num_batched_tokens": 512, "session_len": 128},
        {"max_num_seqs": 16, "max_num_batched_tokens": 16, "session_len": 128},
    ],
    ids=str,
)
def test_it_gets_ready_whatever_the_limits_are(workspace: Workspace, overrides: dict[str, int]) -> None:
    """More tokens in a step than a session may have; no room for a prompt beside the decodes."""
    runner = ModelRunner(workspace, workspace.engine_config(device="cuda", cache_max_entry_count=40, **overrides))
    seqs = sequences([20] * overrides["max_num_seqs"], 40)
    assert len(run(runner, decode(seqs))[1]) == overrides["max_num_seqs"]


def test_the_largest_step_takes_no_more_memory_once_ready(workspace: Workspace) -> None:
    """Capturing graphs gives PyTorch's spare memory back to the card, where another process could take it."""
    config = workspace.engine_config(
        device="cuda", max_num_seqs=8, max_num_batched_tokens=4096, cache_max_entry_count=200, session_len=512
    )
    runner = ModelRunner(workspace, config)
    before = torch.cuda.memory_reserved()
    items = prefill(sequences([512] * 8, 200, **SAMPLING), 512)
    runner.execute(prefills(items)).wait()
    assert torch.cuda.memory_reserved() == before
