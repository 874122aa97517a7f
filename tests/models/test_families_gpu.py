"""Each architecture on a GPU in 16 bits, through graphs, against an independent decoder in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.family_cases import CASES, TRAINED, make
from tests.models.test_families import answer_logits, draw
from tests.models.test_int4 import Dequantized
from tests.models.test_llama import prompt_logits
from tests.workspaces import convert
from tritonmind.engine.llm import LLM
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.sampling_params import SamplingParams
from tritonmind.workspace import Workspace

pytestmark = pytest.mark.gpu

# Logits of these checkpoints spread over about ten; a chosen token may be this far below the reference's best.
TOLERANCE = {0: 0.06, 8: 0.6}


@pytest.mark.parametrize("quant_policy", [0, 8])
@pytest.mark.parametrize("name", CASES)
def test_each_greedy_token_is_the_references_choice(name: str, quant_policy: int, tmp_path: Path) -> None:
    case = CASES[name]
    logits = make(name, tmp_path / "checkpoint", dtype=torch.float16)
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace")
    prompts = [draw(length) for length in (1, 40, TRAINED, TRAINED + 1, 190)]
    with LLM(
        str(path), in_process=True, device="cuda", session_len=case.session_len, quant_policy=quant_policy,
        cache_max_entry_count=40, max_num_batched_tokens=128, max_num_seqs=4,
    ) as llm:  # fmt: skip
        answers = llm.generate(prompts, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
        assert llm.engine.stats().num_jit_compiles == 0
        llm.engine.check_integrity()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == 64
        scores = answer_logits(logits, case, prompt, answer.token_ids)
        chosen = scores.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
        assert (scores.max(dim=1).values - chosen).max() < TOLERANCE[quant_policy]


@pytest.mark.parametrize("name", ["qwen2", "internlm", "qwen3-biases-tied-yarn"])
def test_4_bits_with_biases(name: str, tmp_path: Path) -> None:
    """Against the same weights dequantised, in fp32 on the CPU."""
    make(name, tmp_path / "checkpoint", dtype=torch.float16)
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace", "--weight-type", "int4", "--group-size", "32")
    dense = Dequantized(Workspace.open(path))  # type: ignore[arg-type]
    options = {"cache_max_entry_count": 40, "session_len": 256}
    runner = ModelRunner(dense, dense.engine_config(device="cpu", **options))  # type: ignore[arg-type]
    prompts = [draw(length) for length in (1, 40, 150)]
    with LLM(str(path), in_process=True, device="cuda", max_num_batched_tokens=128, max_num_seqs=4, **options) as llm:
        answers = llm.generate(prompts, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    for prompt, answer in zip(prompts, answers, strict=True):
        scores = prompt_logits(runner, prompt + answer.token_ids)[len(prompt) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
        assert (scores.max(dim=1).values - chosen).max() < TOLERANCE[0]
