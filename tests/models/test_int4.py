"""The decoder with 4-bit weights against the same weights dequantised: on a CPU, and on a GPU through the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.models.test_llama import prompt_logits
from tritonmind.config import EngineConfig
from tritonmind.engine.llm import LLM
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.kernels.awq_format import AwqWeight, dequantize
from tritonmind.model_source import open_model
from tritonmind.random_model import RandomModel
from tritonmind.sampling_params import SamplingParams

OPTIONS: dict[str, Any] = {"max_num_seqs": 4, "cache_max_entry_count": 16, "num_threads": 1}


class Dequantized:
    """A model whose weights are those of another one, in fp32. scale: of its linear weights, for logits that differ."""

    def __init__(self, source: RandomModel) -> None:
        self._source = source
        self.model = dataclasses.replace(source.model, weight_type="fp32", group_size=0)

    def engine_config(self, **overrides: Any) -> EngineConfig:
        return dataclasses.replace(self._source.engine_config(**overrides), model=self.model)

    def tensors(self, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
        parts: dict[str, torch.Tensor] = {}
        for name, tensor in self._source.tensors(rank):
            stem, _, kind = name.rpartition(".")
            if kind not in AwqWeight._fields:
                yield name, tensor.float()
                continue
            parts[kind] = tensor
            if len(parts) == len(AwqWeight._fields):
                yield f"{stem}.weight", dequantize(AwqWeight(**parts))
                parts = {}


def test_logits_are_those_of_the_dequantized_weights() -> None:
    source = RandomModel("random:tiny:int4")
    runners = [
        ModelRunner(each, each.engine_config(device="cpu", **OPTIONS))  # type: ignore[arg-type]
        for each in (source, Dequantized(source))
    ]
    prompt = torch.randint(3, source.model.vocab_size, (70,)).tolist()
    ours, expected = (prompt_logits(runner, prompt) for runner in runners)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected)
    assert not any(kind in name for name in runners[0].model.state_dict() for kind in AwqWeight._fields)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_each_greedy_token_is_that_of_the_dequantized_weights(dtype: str, enforce_eager: bool) -> None:
    """In graphs and out of them, alone and in batches, with prompts of many lengths; nothing is compiled when ready."""
    source = RandomModel("random:llama-150m:int4")
    dense = Dequantized(source)
    prompts = [torch.randint(3, 32000, (length,)).tolist() for length in (1, 2, 17, 64, 65, 200, 700)]
    options = {**OPTIONS, "max_num_seqs": 5, "cache_max_entry_count": 100, "max_num_batched_tokens": 512}
    with LLM("random:llama-150m:int4", in_process=True, dtype=dtype, enforce_eager=enforce_eager, **options) as llm:
        answers = llm.generate(prompts, SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
        assert llm.engine.stats().num_jit_compiles == 0
    runner = ModelRunner(dense, dense.engine_config(device="cpu", **OPTIONS))  # type: ignore[arg-type]
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = prompt_logits(runner, prompt + answer.token_ids)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
        spread = logits.std()
        assert (logits.max(dim=1).values - chosen).max() < {"fp16": 0.05, "bf16": 0.4}[dtype] * spread


@pytest.mark.gpu
def test_memory_is_that_of_the_plan() -> None:
    """What was loaded is gone once it is repacked."""
    before = torch.cuda.memory_allocated()
    runner = ModelRunner(open_model("random:llama-150m:int4"), _small())
    layers = sum(
        weight.num_bytes
        for layer in runner.model.layers
        for weight in (layer.w13.packed, layer.w2.packed)  # type: ignore[union-attr]
    )
    assert 0.53 < layers / (16 * 3 * 768 * 2048) < 0.54
    assert torch.cuda.memory_allocated() - before < runner.memory_plan.weights_bytes + (200 << 20)


def _small() -> EngineConfig:
    return open_model("random:llama-150m:int4").engine_config(**{**OPTIONS, "enforce_eager": True})
