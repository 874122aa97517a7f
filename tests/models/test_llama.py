"""The decoder against Transformers' in fp32 on the CPU: logits of whole prompts, and greedy answers through the engine.

A greedy answer is checked in one pass of the reference over prompt and answer: each token must be the reference's
choice after the tokens before it, which by induction is the reference's own greedy answer.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.checkpoints import LLAMA3_ROPE, make_llama_checkpoint
from tests.models.prompts import SMOLLM2_PROMPTS
from tests.workspaces import convert
from tritonmind.engine.llm import LLM
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.model_inputs import AttentionMetadata, ModelInputs
from tritonmind.model_source import open_model
from tritonmind.sampling_params import SamplingParams
from tritonmind.tokenizer import Tokenizer
from tritonmind.workspace import Workspace
from tritonmind_tools.demo import demo_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "one-kv-head": {"num_kv_heads": 1, "num_heads": 8, "head_dim": 24},
    "bias": {"attention_bias": True},
    "tied": {"tie": True},
    "llama3-rope": {"rope_scaling": LLAMA3_ROPE},
    "linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope-theta": {"rope_theta": 500000.0, "head_dim": 32},
}


@torch.inference_mode()
def prompt_logits(runner: ModelRunner, token_ids: list[int], rows: list[int] | None = None) -> torch.Tensor:
    """Logits after the tokens in `rows`, by default all, of a prompt that is computed in one chunk."""
    length, block_size = len(token_ids), runner.config.cache.block_size
    num_blocks = -(-length // block_size)
    # Not in order, so that a block table is needed.
    block_table = torch.arange(num_blocks).flip(0).to(torch.int32)
    positions = torch.arange(length)
    slot_mapping = block_table[positions // block_size] * block_size + (positions % block_size).to(torch.int32)
    empty = torch.zeros(0, dtype=torch.int32)
    inputs = ModelInputs(
        token_ids=torch.tensor(token_ids),
        positions=positions,
        logits_rows=positions if rows is None else torch.tensor(rows, dtype=torch.int32),
        attention=AttentionMetadata(
            num_decodes=0,
            slot_mapping=slot_mapping,
            decode_block_tables=empty.view(0, 0),
            decode_context_lens=empty,
            prefill_block_tables=block_table.unsqueeze(0),
            prefill_context_lens=torch.tensor([length], dtype=torch.int32),
            prefill_cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32),
            max_query_len=length,
            prefill_lens=[(length, length)],
        ),
    )
    return runner.model(inputs, runner.kv_caches)


@torch.inference_mode()
def reference_logits(model: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0]


def assert_greedy(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> None:
    chosen = reference_logits(model, prompt + answer)[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert answer == chosen


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_llama_equals_transformers(variant: str, tmp_path: Path) -> None:
    reference = make_llama_checkpoint(tmp_path / "checkpoint", seed=5, **VARIANTS[variant])
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace", "--weight-type", "fp32")
    workspace = Workspace.open(path)
    config = workspace.engine_config(device="cpu", cache_max_entry_count=40, max_num_batched_tokens=64)
    runner = ModelRunner(workspace, config)
    for length in (1, 7, 64, 200):
        prompt = torch.randint(3, 300, (length,)).tolist()
        torch.testing.assert_close(
            prompt_logits(runner, prompt), reference_logits(reference, prompt), rtol=1e-4, atol=1e-4
        )
    prompts = [torch.randint(3, 300, (length,)).tolist() for length in (1, 5, 63, 64, 65, 200)]
    with LLM(
        str(path), in_process=True, device="cpu", cache_max_entry_count=40, max_num_batched_tokens=64, max_num_seqs=4
    ) as llm:
        answers = llm.generate(prompts, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
        llm.engine.check_integrity()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == 64 and answer.finish_reason == "length"
        assert_greedy(reference, prompt, answer.token_ids)


def test_last_layer_computes_what_is_asked_for(tmp_path: Path) -> None:
    make_llama_checkpoint(tmp_path / "checkpoint", seed=5)
    workspace = Workspace.open(convert(tmp_path / "checkpoint", tmp_path / "workspace", "--weight-type", "fp32"))
    runner = ModelRunner(workspace, workspace.engine_config(device="cpu", cache_max_entry_count=40))
    computed: list[int] = []
    for layer in runner.model.layers:
        layer.w2.register_forward_hook(lambda _, inputs, __: computed.append(len(inputs[0])))
    prompt = torch.randint(3, 300, (70,)).tolist()
    every = prompt_logits(runner, prompt)
    assert computed == [70] * len(computed)
    computed.clear()
    torch.testing.assert_close(prompt_logits(runner, prompt, [69, 3]), every[[69, 3]], rtol=1e-4, atol=1e-4)
    assert computed == [70] * (len(computed) - 1) + [2]
    # In the midst of a prompt nothing is asked for, but K and V are written: the rest of the answer needs them.
    computed.clear()
    assert prompt_logits(runner, prompt, []).shape == (0, every.shape[1]) and computed[-1] == 0


@pytest.fixture(scope="module")
def smollm2_reference() -> LlamaForCausalLM:
    file = demo_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model.eval()


def test_q_k_and_v_are_gone_when_the_feed_forward_begins() -> None:
    """They are the most that a layer holds of a long step, beside what the feed-forward block needs."""
    source = open_model("random:tiny")
    runner = ModelRunner(source, source.engine_config(device="cpu", cache_max_entry_count=4, max_model_len=64))
    layer = runner.model.layers[0]
    made: list[weakref.ref[torch.Tensor]] = []
    layer.w_qkv.register_forward_hook(lambda _, args, out: made.append(weakref.ref(out)))
    left: list[torch.Tensor | None] = []
    layer.w13.register_forward_pre_hook(lambda _, args: left.append(made[0]()))
    prompt_logits(runner, [5, 6, 7])
    assert left == [None]


def test_smollm2_equals_transformers_on_real_prompts(
    smollm2_workspace: Path, smollm2_reference: LlamaForCausalLM
) -> None:
    workspace = Workspace.open(smollm2_workspace)
    tokenizer = Tokenizer.from_dir(workspace.tokenizer_dir)
    prompts = [tokenizer.encode(text, add_special_tokens=True) for text in SMOLLM2_PROMPTS]
    runner = ModelRunner(
        workspace, workspace.engine_config(device="cpu", cache_max_entry_count=128, max_num_batched_tokens=512)
    )
    for prompt in prompts:
        difference = (prompt_logits(runner, prompt) - reference_logits(smollm2_reference, prompt)).abs().max()
        assert difference < 1e-3
    del runner
    with LLM(str(smollm2_workspace), in_process=True, device="cpu", cache_max_entry_count=160) as llm:
        answers = llm.generate(prompts, SamplingParams(max_tokens=128, temperature=0.0, ignore_eos=True))
        llm.engine.check_integrity()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == 128
        assert_greedy(smollm2_reference, prompt, answer.token_ids)
