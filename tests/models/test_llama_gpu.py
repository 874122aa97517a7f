"""The decoder on a GPU, through the engine with one step in flight, against Transformers in fp32 on the same card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_llama_checkpoint
from tests.workspaces import convert
from tritonmind.engine.llm import LLM
from tritonmind.sampling_params import SamplingParams

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


SAMPLING = {
    "temperature": {"temperature": 0.8},
    "filters": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "everything": {"temperature": 1.1, "top_p": 0.95, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
}


@pytest.mark.parametrize("options", SAMPLING)
def test_sampling_on_the_card_equals_the_cpu(options: str, tmp_path: Path) -> None:
    make_llama_checkpoint(tmp_path / "checkpoint", head_dim=64, num_heads=4, num_kv_heads=2, hidden=256)
    path = convert(tmp_path / "checkpoint", tmp_path / "workspace", "--weight-type", "fp32")
    params = SamplingParams(max_tokens=40, seed=7, ignore_eos=True, **SAMPLING[options])
    texts = []
    for device in ("cpu", "cuda"):
        with LLM(str(path), in_process=True, device=device, cache_max_entry_count=60, max_num_batched_tokens=64) as llm:
            texts.append([answer.token_ids for answer in llm.generate([[5, 6, 7], [8] * 30], params)])
    assert texts[0] == texts[1]
