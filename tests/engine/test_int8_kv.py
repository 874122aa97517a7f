"""The engine over an int8 KV cache: near to one over floats, the same however prompts are cut, no late compiles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.gpu_steps import decode, prefills, sequences
from tests.workspaces import tiny_workspace
from tritonmind.config import QuantPolicy
from tritonmind.engine.llm import LLM
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.engine.scheduler_output import ScheduledSequence, SchedulerOutput
from tritonmind.errors import ConfigError
from tritonmind.kernels.dispatch import force_triton
from tritonmind.kernels.kv_quant import asymmetric_scale
from tritonmind.sampling_params import SamplingParams
from tritonmind.sequence import Sequence
from tritonmind.workspace import Workspace
from tritonmind.workspace_writer import write_kv_scales

NUM_BLOCKS = 24
LENGTH = 150
POLICIES = [QuantPolicy.KV_INT8_CALIBRATED, QuantPolicy.KV_INT8]
# Of logits, against those over K and V as they are, for random weights, whose attention is sharp.
MAX_ERROR = {QuantPolicy.KV_INT8_CALIBRATED: 0.1, QuantPolicy.KV_INT8: 0.05}
# Between ways to compute the same: where rounding differs, one byte in thousands is another.
MAX_DIFFERENCE = {"cpu": 2e-3, "cuda": 1e-2}
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, device: str) -> Path:
    """With scales of a calibration: of what an engine without them has in its cache."""
    path = tiny_workspace(
        tmp_path_factory.mktemp("int8"), num_heads=4, num_kv_heads=2, head_dim=64, hidden=256, vocab=320
    )
    runner = make_runner(path, device, QuantPolicy.NONE)
    last_logits(runner, [LENGTH])
    blocks = [cache.k.abs().amax((1, 2, 3)) > 0 for cache in runner.kv_caches]
    scales = [
        torch.tensor([float(x) for pool in cache[:2] for x in asymmetric_scale(*pool[used].aminmax())])
        for cache, used in zip(runner.kv_caches, blocks, strict=True)
    ]
    write_kv_scales(Workspace.open(path), [scales])
    return path


def make_runner(path: Path, device: str, policy: QuantPolicy, **overrides: object) -> ModelRunner:
    workspace = Workspace.open(path)
    dtype = "fp16" if device == "cuda" else "auto"
    settings = {"max_num_seqs": 3, "max_num_batched_tokens": 192, "cache_max_entry_count": NUM_BLOCKS, **overrides}
    return ModelRunner(workspace, workspace.engine_config(device=device, dtype=dtype, quant_policy=policy, **settings))


def prompt() -> Sequence:
    """The same tokens each time."""
    torch.manual_seed(5)
    return sequences([LENGTH], NUM_BLOCKS)[0]


def last_logits(runner: ModelRunner, chunks: list[int]) -> torch.Tensor:
    """After the last token of a prompt that is computed in these chunks; a last chunk of one token is a decode."""
    seq, start = prompt(), 0
    for chunk in chunks:
        is_last = start + chunk == LENGTH
        if chunk == 1 and is_last:
            runner.execute(decode([seq])).wait()
        else:
            runner.execute(prefills([ScheduledSequence(seq, start, chunk, is_last)])).wait()
        start += chunk
    assert start == LENGTH
    return runner.logits[0].float().cpu()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("policy", POLICIES)
def test_logits_are_near_those_without(workspace: Path, device: str, policy: QuantPolicy) -> None:
    """And the same whether a prompt is whole, in chunks, or its last token a decode's."""
    expected = last_logits(make_runner(workspace, device, QuantPolicy.NONE), [LENGTH])
    runner = make_runner(workspace, device, policy)
    assert all(cache.k.dtype == cache.v.dtype == torch.uint8 for cache in runner.kv_caches)
    whole = last_logits(runner, [LENGTH])
    assert 0 < relative(whole, expected) < MAX_ERROR[policy]
    for chunks in ([64, 37, 49], [1, 148, 1], [LENGTH - 1, 1]):
        assert relative(last_logits(runner, chunks), whole) < MAX_DIFFERENCE[device], f"in chunks of {chunks}"


def test_decodes_beside_prompts(workspace: Path, device: str) -> None:
    """Prompts that between them do not fit the scratch of a GPU go through it one after the other."""
    runner = make_runner(workspace, device, QuantPolicy.KV_INT8, max_num_batched_tokens=128, session_len=256)
    whole = last_logits(runner, [64, LENGTH - 64])
    # Each of three has a whole scratch of context, of 4 pages: two chunks and a decode.
    torch.manual_seed(5)
    seqs = sequences([LENGTH, 200, 180], NUM_BLOCKS)
    for seq in seqs:
        for start in range(0, len(seq.token_ids) - 3, 100):
            chunk = min(100, len(seq.token_ids) - 3 - start)
            runner.execute(prefills([ScheduledSequence(seq, start, chunk, False)])).wait()
    runner.execute(
        SchedulerOutput(decode([]).decodes, [ScheduledSequence(seq, len(seq.token_ids) - 3, 3, True) for seq in seqs])
    ).wait()
    assert relative(runner.logits[0].float().cpu(), whole) < MAX_DIFFERENCE[device]
    runner.execute(
        SchedulerOutput(decode(seqs[:1]).decodes, [ScheduledSequence(seqs[1], len(seqs[1].token_ids) - 3, 3, True)])
    ).wait()
    assert relative(runner.logits[0].float().cpu(), whole) < MAX_DIFFERENCE[device]


def test_kernels_serve_steps_as_the_cpu_does(workspace: Path, device: str) -> None:
    """What only a GPU does, under the interpreter: prompts through a scratch, beside a decode, and after a chunk."""
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter needs TRITON_INTERPRET=1")
    pytest.importorskip("triton")

    def logits(runner: ModelRunner) -> torch.Tensor:
        torch.manual_seed(5)
        seqs, found = sequences([8, 70], NUM_BLOCKS), []
        for output in (
            prefills([ScheduledSequence(seqs[0], 0, 8, True)]),
            SchedulerOutput(decode(seqs[:1]).decodes, [ScheduledSequence(seqs[1], 0, 66, False)]),
            prefills([ScheduledSequence(seqs[0], 6, 2, True), ScheduledSequence(seqs[1], 66, 4, True)]),
        ):
            runner.execute(output).wait()
            found.append(runner.logits[: len(output.prefills) if not output.decodes.seqs else 1].clone())
        return torch.cat(found)

    runner = make_runner(workspace, device, QuantPolicy.KV_INT8)
    expected = logits(runner)
    shape = (3, *runner.kv_caches[0].k.shape[1:])
    scratch = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    runner.kv_caches = [cache._replace(scratch=scratch) for cache in runner.kv_caches]
    with force_triton():
        assert relative(logits(runner), expected) < MAX_DIFFERENCE[device]


@pytest.mark.parametrize("policy", POLICIES)
def test_hits_and_preemptions_change_nothing(workspace: Path, device: str, policy: QuantPolicy) -> None:
    dtype = "fp16" if device == "cuda" else "auto"
    settings = {"quant_policy": policy, "device": device, "dtype": dtype, "in_process": True, "session_len": 192}
    prompts = [[3 + (7 * i + number) % 300 for i in range(130)] for number in range(4)]
    with LLM(str(workspace), cache_max_entry_count=40, **settings) as llm:  # type: ignore[arg-type]
        missed = llm.generate(prompts, GREEDY)
        hit = llm.generate(prompts, GREEDY)
        assert "int8 KV cache" in llm.engine.info.memory_plan
        assert [one.num_cached_tokens for one in hit] == [128] * 4
        assert [one.token_ids for one in hit] == [one.token_ids for one in missed]
        assert llm.engine.stats().num_jit_compiles == 0, "a kernel was compiled while serving"
        llm.engine.check_integrity()
    with LLM(str(workspace), cache_max_entry_count=5, enable_prefix_caching=False, **settings) as llm:  # type: ignore[arg-type]
        crowded = llm.generate(prompts, SamplingParams(max_tokens=62, temperature=0.0, ignore_eos=True))
        assert [one.token_ids[:20] for one in crowded] == [one.token_ids for one in missed]


def test_blocks_take_half(workspace: Path, device: str) -> None:
    """Of fp16's bytes, and 4 bytes for each token and head where those have scales."""
    if device == "cpu":
        pytest.skip("a CPU computes in fp32")
    sizes = [make_runner(workspace, device, policy).memory_plan.block_bytes for policy in QuantPolicy]
    assert sizes[0] == 2 * sizes[1] and sizes[2] == sizes[1] * (64 + 4) // 64


def test_a_calibration_is_asked_for(tmp_path: Path) -> None:
    path = tiny_workspace(tmp_path)
    with pytest.raises(ConfigError, match=r"quant_policy=4 .*lite kv_qparams --work_dir .* --turbomind_dir .*=8"):
        make_runner(path, "cpu", QuantPolicy.KV_INT8_CALIBRATED)
    workspace = Workspace.open(path)
    rows = torch.tensor([[0.1, 0.0, 0.2, 0.5]] * workspace.model.num_layers)
    for column, value, wrong in ((2, 0.0, "v_scale of layer 1 is 0.0"), (1, float("nan"), "k_zero of layer 1 is nan")):
        changed = rows.clone()
        changed[1, column] = value
        write_kv_scales(Workspace.open(path), [list(changed)])
        with pytest.raises(ConfigError, match=wrong):
            make_runner(path, "cpu", QuantPolicy.KV_INT8_CALIBRATED)
