"""The decoder on a GPU, through the engine with one step in flight, against Transformers in fp32 on the same card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_llama_checkpoint
from tests.workspaces import convert
from tritonmind.engine.llm import LLM
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.model_inputs import AttentionMetadata, ModelInputs
from tritonmind.sampling_params import SamplingParams
from tritonmind.workspace import Workspace

pytestmark = pytest.mark.gpu

# Logits of these checkpoints spread over about ten; a chosen token may be this far below the reference's best.
TOLERANCE = {"fp16": 0.05, "bf16": 0.4}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("num_kv_heads", "enforce_eager"), [(1, False), (2, False), (4, False), (2, True)])
def test_each_greedy_token_is_the_references_choice(
    dtype: str, head_dim: int, num_kv_heads: int, enforce_eager: bool, tmp_path: Path
) -> None:
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    reference = make_llama_checkpoint(
        tmp_path / "checkpoint",
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden=256,
        dtype=torch_dtype,
    )
    reference = reference.float().cuda()
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace")
    prompts = [torch.randint(3, 300, (length,)).tolist() for length in (1, 2, 17, 64, 65, 200, 350)]
    with LLM(
        str(path),
        in_process=True,
        device="cuda",
        enforce_eager=enforce_eager,
        cache_max_entry_count=60,
        max_num_batched_tokens=128,
        max_num_seqs=5,
    ) as llm:
        assert llm.engine.info.device == "cuda"
        answers = llm.generate(prompts, SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True))
        again = llm.generate(prompts, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
        llm.engine.check_integrity()
    for prompt, answer, short in zip(prompts, answers, again, strict=True):
        assert len(answer.token_ids) == 100
        assert short.num_cached_tokens == (len(prompt) - 1) // 64 * 64
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer.token_ids], device="cuda")).logits[0]
        logits = logits[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer.token_ids, device="cuda").unsqueeze(1)).squeeze(1)
        assert (logits.max(dim=1).values - chosen).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("num_decodes", [1, 3, 8, 11])
def test_graph_replay_equals_eager(num_decodes: int, tmp_path: Path) -> None:
    """Batch sizes on and between the buckets, random K and V, after a larger batch has left its rows behind."""
    make_llama_checkpoint(
        tmp_path / "checkpoint", num_heads=4, num_kv_heads=2, head_dim=64, hidden=256, dtype=torch.float16
    )
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace")
    workspace = Workspace.open(path)
    runner = ModelRunner(workspace, workspace.engine_config(device="cuda", max_num_seqs=11, cache_max_entry_count=100))
    for k_cache, v_cache in runner.kv_caches:
        k_cache.normal_()
        v_cache.normal_()
    assert runner.graphs is not None
    with torch.inference_mode():
        runner.graphs.run(decode_inputs(11))
        inputs = decode_inputs(num_decodes)
        eager = runner.model(inputs, runner.kv_caches)
        replayed = runner.graphs.run(inputs)
    torch.testing.assert_close(replayed, eager, rtol=1e-2, atol=2e-2)


def decode_inputs(num_decodes: int) -> ModelInputs:
    """Decodes of random tokens at random positions, each sequence with blocks of its own out of 100."""
    block_tables = torch.randperm(100)[: num_decodes * 8].view(num_decodes, 8).to(torch.int32)
    context_lens = torch.randint(1, 500, (num_decodes,))
    positions = context_lens - 1
    slots = block_tables.gather(1, (positions // 64).unsqueeze(1)).squeeze(1) * 64 + (positions % 64).to(torch.int32)
    nothing = torch.zeros(0, dtype=torch.int32, device="cuda")
    return ModelInputs(
        token_ids=torch.randint(3, 300, (num_decodes,)).cuda(),
        positions=positions.cuda(),
        logits_rows=torch.arange(num_decodes).cuda(),
        attention=AttentionMetadata(
            num_decodes=num_decodes,
            slot_mapping=slots.cuda(),
            decode_block_tables=block_tables.cuda(),
            decode_context_lens=context_lens.to(torch.int32).cuda(),
            prefill_block_tables=nothing.view(0, 0),
            prefill_context_lens=nothing,
            prefill_cu_seqlens_q=torch.zeros(1, dtype=torch.int32, device="cuda"),
            max_query_len=0,
        ),
    )


def test_sampling_on_the_card_equals_the_cpu(tmp_path: Path) -> None:
    make_llama_checkpoint(tmp_path / "checkpoint", head_dim=64, num_heads=4, num_kv_heads=2, hidden=256)
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace", "--weight-type", "fp32")
    params = SamplingParams(max_tokens=40, temperature=0.8, top_k=40, top_p=0.9, seed=7, ignore_eos=True)
    texts = []
    for device in ("cpu", "cuda"):
        with LLM(str(path), in_process=True, device=device, cache_max_entry_count=60, max_num_batched_tokens=64) as llm:
            texts.append([answer.token_ids for answer in llm.generate([[5, 6, 7], [8] * 30], params)])
    assert texts[0] == texts[1]
