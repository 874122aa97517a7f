"""Decoders with 4-bit weights against Transformers' with the weights that these stand for, in fp32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.test_llama import assert_greedy, prompt_logits, reference_logits
from tests.quantized_checkpoints import make_quantized
from tests.workspaces import convert
from tritonmind.engine.llm import LLM
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.model_source import open_model
from tritonmind.sampling_params import SamplingParams


def reference(checkpoint: Path, state: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    config = LlamaConfig.from_pretrained(checkpoint)
    del config.quantization_config
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


@pytest.mark.parametrize(
    ("method", "converted"), [("awq", True), ("gptq", False)], ids=["awq, converted", "gptq, as it stands"]
)
def test_answers_are_those_of_the_dequantised_weights(tmp_path: Path, method: str, converted: bool) -> None:
    path = tmp_path / "checkpoint"
    expected = reference(path, make_quantized(path, method, attention_bias=True, intermediate=160))
    if converted:
        path = convert(path, tmp_path / "workspace", "--model-format", method)
    source = open_model(path)
    runner = ModelRunner(
        source, source.engine_config(device="cpu", cache_max_entry_count=40, max_num_batched_tokens=64)
    )
    prompt = torch.randint(3, 300, (70,)).tolist()
    torch.testing.assert_close(prompt_logits(runner, prompt), reference_logits(expected, prompt), rtol=1e-4, atol=1e-4)
    with LLM(str(path), in_process=True, device="cpu", cache_max_entry_count=40) as llm:
        answer = llm.generate([prompt], SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True))[0]
    assert_greedy(expected, prompt, answer.token_ids)
