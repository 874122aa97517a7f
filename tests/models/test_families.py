"""Each architecture, and each thing that changes its arithmetic, against an independent decoder in fp32 on the CPU.

A greedy answer is checked in passes of the reference over prompt and answer: each token must be its choice after the
tokens before it. Where rotary frequencies depend on the length there is a pass for each of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.converted import assert_same, read_all
from tests.model_configs import LLAMA_2_7B
from tests.models.family_cases import CASES, TRAINED, VOCAB, Case, Logits, make
from tests.models.test_int4 import Dequantized
from tests.models.test_llama import prompt_logits
from tests.tools.lite_cases import run_calibrate
from tests.workspaces import convert
from tritonmind.checkpoints.checkpoint_model import CheckpointModel
from tritonmind.checkpoints.reading import open_checkpoint, read_weights
from tritonmind.config import RopeScaling
from tritonmind.engine.llm import LLM
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.kernels.awq_format import AwqWeight, dequantize, quantize
from tritonmind.layers.rotary import rotary_table
from tritonmind.sampling_params import SamplingParams
from tritonmind.tokenizer import Tokenizer
from tritonmind.workspace import Workspace
from tritonmind_tools.cli import main

# One of each packing, with head norms and with a window.
CALIBRATED = ("qwen3-biases-tied-yarn", "mistral-window", "internlm2-biases-dynamic", "qwen", "baichuan2")
OPTIONS: dict[str, Any] = {"device": "cpu", "cache_max_entry_count": 100, "cache_block_seq_len": 16, "max_num_seqs": 5}
GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
# One of each architecture.
ONE_OF_EACH = (
    "llama-biases-tied",
    "mistral-window",
    "qwen2-tied-yarn",
    "qwen3-biases-tied-yarn",
    "internlm",
    "internlm2-biases-dynamic",
    "internlm3",
    "qwen",
    "baichuan",
    "baichuan2",
)


def draw(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,)).tolist()


def answer_logits(logits: Logits, case: Case, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Those of the reference that each token of the answer is chosen by: [tokens, vocab_size]."""
    tokens, found = prompt + answer, []
    begin = len(prompt)
    for limit in (*case.rope_limits, case.session_len):
        end = min(limit, len(tokens) - 1)
        if end >= begin:
            found.append(logits(tokens[:end])[begin - 1 :])
            begin = end + 1
    return torch.cat(found)


def assert_greedy(logits: Logits, case: Case, prompt: list[int], answer: list[int]) -> None:
    assert answer == answer_logits(logits, case, prompt, answer).argmax(-1).tolist()


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    logits = make(name, tmp_path / "checkpoint")
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace", "--weight-type", "fp32")
    online = CheckpointModel(tmp_path / "checkpoint", weight_type="fp32")
    assert_same(dict(online.tensors(0)), read_all(path))
    workspace = Workspace.open(path)
    assert workspace.model == dataclasses.replace(online.model, model_name=workspace.model.model_name)
    options = {**OPTIONS, "session_len": case.session_len, "max_num_batched_tokens": 64}
    runner = ModelRunner(workspace, workspace.engine_config(**options))
    assert runner.rope_limits == case.rope_limits
    for length in (1, 50, 64 if case.rope_limits else 200):
        prompt = draw(length)
        torch.testing.assert_close(prompt_logits(runner, prompt), logits(prompt), rtol=1e-4, atol=1e-4)
    # Those that begin alike share blocks, if their lengths have the same frequencies.
    long = draw(190)
    prompts = [long[:1], long[:TRAINED], long[: TRAINED + 1], long[:100], long]
    with LLM(str(path), in_process=True, **options) as llm:
        answers = llm.generate(prompts, GREEDY)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert len(answer.token_ids) == 64
            assert_greedy(logits, case, prompt, answer.token_ids)
        again = llm.generate([long], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))[0]
        assert again.num_cached_tokens == 176 and again.token_ids == answers[-1].token_ids[:4]
        llm.engine.check_integrity()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_two_ranks_hold_the_weights(name: str, tmp_path: Path) -> None:
    """Each half of the heads and of the feed-forward's channels, whatever the checkpoint packs."""
    make(name, tmp_path / "checkpoint")
    whole = CheckpointModel(tmp_path / "checkpoint", weight_type="fp32")
    dense, model = dict(whole.tensors(0)), whole.model
    split = {
        target: torch.cat(blocks)
        for target, blocks in read_weights(open_checkpoint(tmp_path / "checkpoint"), model, tp=2)
    }
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    for i, rank in itertools.product(range(model.num_layers), range(2)):
        for kind in ("weight", "bias")[: 1 + model.qkv_bias]:
            parts = dense[f"layers.{i}.attention.w_qkv.0.{kind}"].split((q_width, kv_width, kv_width))
            expected = torch.cat([part.chunk(2)[rank] for part in parts])
            assert torch.equal(split[f"layers.{i}.attention.w_qkv.{rank}.{kind}"], expected)
        for target, dim in (
            ("attention.wo", 1),
            ("feed_forward.w1", 0),
            ("feed_forward.w3", 0),
            ("feed_forward.w2", 1),
        ):
            expected = dense[f"layers.{i}.{target}.0.weight"].chunk(2, dim)[rank]
            assert torch.equal(split[f"layers.{i}.{target}.{rank}.weight"], expected)


PASSKEY = ("The grass is green. The sky is blue. ", "The pass key is 71432. Remember it. ", "What is the pass key?")


@pytest.mark.parametrize("name", ["llama-dynamic", "qwen2-tied-yarn"])
def test_passkey_at_four_times_the_trained_length(name: str, tmp_path: Path) -> None:
    """The answer up to the last token that fits is Transformers' own."""
    case = CASES[name]
    logits = make(name, tmp_path / "checkpoint")
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace", "--weight-type", "fp32")
    tokenizer = Tokenizer.from_dir(Workspace.open(path).tokenizer_dir)
    filler, key, question = (tokenizer.encode(text, add_special_tokens=False) for text in PASSKEY)
    room = 4 * TRAINED - 32 - len(key) - len(question)
    prompt = [*(filler * 100)[: room // 3], *key, *(filler * 100)[: room - room // 3], *question]
    with LLM(str(path), in_process=True, session_len=4 * TRAINED, **OPTIONS) as llm:
        answer = llm.generate([prompt], SamplingParams(temperature=0.0, ignore_eos=True))[0]
    assert len(prompt) + len(answer.token_ids) == 4 * TRAINED
    assert_greedy(logits, case, prompt, answer.token_ids)


@pytest.mark.parametrize(
    ("scaling", "known"),
    [
        (None, 64),
        (RopeScaling(rope_type="linear", factor=2.0), 128),
        (RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 128),
        (RopeScaling(rope_type="dynamic", factor=1.0), None),
    ],
)
def test_a_context_longer_than_the_model_knows_is_warned_of(
    scaling: RopeScaling | None, known: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = dataclasses.replace(LLAMA_2_7B, max_position_embeddings=64, rope_scaling=scaling)
    rotary_table(model, known or 1000, torch.device("cpu"))
    assert not caplog.messages
    if known:
        rotary_table(model, known + 1, torch.device("cpu"))
        (message,) = caplog.messages
        assert f"session_len={known + 1} is more than the {known} tokens that the model knows" in message
        assert ("rope_scaling_factor" in message) == (scaling is None)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_4_bits(name: str, tmp_path: Path) -> None:
    """Rounded while loading, quantised by `lite auto_awq`, and computed with: all by the weights in fp32."""
    make(name, tmp_path / "checkpoint")
    dense = dict(CheckpointModel(tmp_path / "checkpoint", weight_type="fp32").tensors(0))
    command = ["lite", "auto_awq", "--model", str(tmp_path / "checkpoint"), "--work_dir", str(tmp_path / "awq")]
    assert main([*command, "--round_to_nearest", "--w_group_size", "32"]) == 0
    source = CheckpointModel(tmp_path / "awq")
    stored = dict(source.tensors(0))
    for target, weight in dense.items():
        stem = target.removesuffix(".weight")
        if f"{stem}.qweight" in stored:
            found = AwqWeight(*(stored[f"{stem}.{kind}"] for kind in AwqWeight._fields))
            torch.testing.assert_close(dequantize(found), dequantize(quantize(weight, 32)), rtol=0, atol=0)
        else:
            torch.testing.assert_close(stored[target], weight.half())
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace", "--weight-type", "int4", "--group-size", "32")
    rounded = {key: value for key, value in read_all(path).items() if "qweight" in key or "qzeros" in key}
    assert_same({key: stored[key] for key in rounded}, rounded)
    runners = [
        ModelRunner(each, each.engine_config(**OPTIONS, session_len=128))  # type: ignore[arg-type]
        for each in (source, Dequantized(source))  # type: ignore[arg-type]
    ]
    prompt = draw(50)
    ours, expected = (prompt_logits(runner, prompt) for runner in runners)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_int8_cache(name: str, tmp_path: Path) -> None:
    """With a scale for each token and head: near the logits without, and not the same."""
    logits = make(name, tmp_path / "checkpoint")
    source = CheckpointModel(tmp_path / "checkpoint", weight_type="fp32")
    runner = ModelRunner(source, source.engine_config(**OPTIONS, session_len=128, quant_policy=8))
    prompt = draw(50)
    expected = logits(prompt)
    assert 0 < (prompt_logits(runner, prompt) - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated(name: str, tmp_path: Path) -> None:
    """`lite calibrate` and the search of AWQ: what comes out is the model, about as well as rounding has it."""
    logits = make(name, tmp_path / "checkpoint")
    run_calibrate(tmp_path)
    command = ["lite", "auto_awq", "--model", str(tmp_path / "checkpoint"), "--work_dir", str(tmp_path / "work")]
    assert main([*command, "--search_scale", "true", "--w_group_size", "32"]) == 0
    found = CheckpointModel(tmp_path / "work")
    rounded = Workspace.open(
        convert(tmp_path / "checkpoint", tmp_path / "workspace", "--weight-type", "int4", "--group-size", "32")
    )
    prompt = draw(50)
    expected = logits(prompt)
    errors = []
    for source in (found, rounded):
        runner = ModelRunner(source, source.engine_config(**OPTIONS, session_len=128))
        errors.append((prompt_logits(runner, prompt) - expected).norm() / expected.norm())
    assert errors[0] < max(1.3 * errors[1], 0.5)
