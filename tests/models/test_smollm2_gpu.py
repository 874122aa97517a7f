"""Real weights on a GPU: logits and greedy answers against Transformers in fp32 on the same card.

TRITONMIND_DEMO_GGUF names the file where the package that ships it cannot be installed.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.models.prompts import SMOLLM2_PROMPTS
from tests.workspaces import convert
from tritonmind.engine.core import EngineCore
from tritonmind.engine.llm import LLM
from tritonmind.messages import EngineRequest
from tritonmind.sampling_params import SamplingParams
from tritonmind.tokenizer import Tokenizer
from tritonmind.workspace import Workspace
from tritonmind_tools.demo import demo_checkpoint

pytestmark = pytest.mark.gpu

# Logits of these prompts have a standard deviation of about 3; a greedy token may be this far below the best one.
LOGIT_TOLERANCE = {"fp16": 0.1, "bf16": 0.8}
# How far our rounding may take logits from fp32, as a multiple of what it does to Transformers in the same type.
MAX_ERROR_RATIO = 1.25
NUM_TOKENS = 128
QUESTIONS = {
    "What is the capital of France? Answer in one sentence.": "Paris",
    "What is 2 + 2?": "4",
    "Who wrote Romeo and Juliet?": "Shakespeare",
}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    given = os.environ.get("TRITONMIND_DEMO_GGUF")
    return Path(given) if given else demo_checkpoint()


@pytest.fixture(scope="module")
def workspace(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(checkpoint, tmp_path_factory.mktemp("smollm2") / "workspace")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.parent, gguf_file=checkpoint.name, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model.eval().cuda()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_greedy_answers_are_the_references_choices(dtype: str, workspace: Path, reference: LlamaForCausalLM) -> None:
    """Each token's logit in the reference, after the same tokens, is the largest or as near as rounding allows."""
    with LLM(str(workspace), in_process=True, device="cuda", dtype=dtype, cache_max_entry_count=200) as llm:
        prompts = [llm.tokenizer.encode(text, add_special_tokens=True) for text in SMOLLM2_PROMPTS]
        greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        answers = llm.generate(prompts, greedy)
        for question, expected in QUESTIONS.items():
            (answer,) = llm.generate(
                [[{"role": "user", "content": question}]], SamplingParams(max_tokens=60, temperature=0.0)
            )
            assert expected in answer.text
        assert llm.engine.stats().num_jit_compiles == 0
        llm.engine.check_integrity()
    num_best = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == NUM_TOKENS
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer.token_ids], device="cuda")).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer.token_ids, device="cuda").unsqueeze(1)).squeeze(1)
        behind = logits.max(dim=1).values - chosen
        assert behind.max() < LOGIT_TOLERANCE[dtype]
        num_best += int((behind == 0).sum())
    share = num_best / (NUM_TOKENS * len(prompts))
    print(f"{dtype}: {share:.2%} of the tokens are the reference's own choice")
    assert share > 0.95


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_logits_are_as_near_to_fp32_as_those_of_transformers(
    dtype: str, workspace: Path, checkpoint: Path, reference: LlamaForCausalLM
) -> None:
    """The logits that the first token of each prompt is drawn from, against those of the reference in the same type."""
    rounded = AutoModelForCausalLM.from_pretrained(
        checkpoint.parent, gguf_file=checkpoint.name, dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    ).cuda()
    opened = Workspace.open(workspace)
    tokenizer = Tokenizer.from_dir(opened.tokenizer_dir)
    config = opened.engine_config(
        device="cuda", dtype=dtype, cache_max_entry_count=200, max_num_batched_tokens=512, enable_prefix_caching=False
    )
    core = EngineCore(opened, config)
    ours, theirs = [], []
    for number, text in enumerate(SMOLLM2_PROMPTS):
        prompt = tokenizer.encode(text, add_special_tokens=True)
        core.add(
            EngineRequest(
                request_id=number, prompt_token_ids=prompt, max_tokens=1, temperature=0.0, top_k=0, top_p=1.0, seed=0,
                stop_token_ids=[],
            )
        )  # fmt: skip
        while core.has_work:
            core.step()
        with torch.inference_mode():
            ids = torch.tensor([prompt], device="cuda")
            exact = reference(ids).logits[0, -1]
            ours.append(relative_error(core.executor.runner.logits[0], exact))
            theirs.append(relative_error(rounded(ids).logits[0, -1], exact))
    mean, their_mean = statistics.mean(ours), statistics.mean(theirs)
    print(f"{dtype}: mean error {mean:.2e} of the logits' deviation, Transformers {their_mean:.2e}")
    assert mean < MAX_ERROR_RATIO * their_mean
    assert max(ours) < 2 * MAX_ERROR_RATIO * max(theirs)


def relative_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the error over the standard deviation."""
    return float((logits.float() - exact).square().mean().sqrt() / exact.std())
