"""The decoder with 4-bit weights against the same weights dequantised: on a CPU, and on a GPU through the engine."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.models.test_llama import prompt_logits
from tritonmind.config import EngineConfig
from tritonmind.engine.device import weight_bytes
from tritonmind.engine.launch import start_engine
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.kernels import tuning
from tritonmind.kernels.awq_format import AwqWeight, dequantize
from tritonmind.kernels.tile_table import Card
from tritonmind.layers.int4_linear import Int4Linear
from tritonmind.messages import TokenOutput
from tritonmind.model_source import open_model
from tritonmind.models.llama import LlamaForCausalLM
from tritonmind.random_model import RandomModel
from tritonmind_tools.bench.rounds import greedy_request

OPTIONS: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 1024, "cache_max_entry_count": 16, "num_threads": 1}


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


@pytest.mark.parametrize(("capability", "max_tokens"), [((8, 0), 4096), ((8, 0), 64), ((9, 0), 4096)])
def test_what_the_plan_counts_is_what_is_allocated(
    capability: tuple[int, int], max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor of the weights: packed ones, what they are written out to, if they are, and the others."""
    monkeypatch.setattr(tuning, "card", lambda device: Card("one that nobody has tuned", capability, 108))
    config = RandomModel("random:tiny:int4").engine_config(max_num_batched_tokens=max_tokens)
    meta = torch.device("meta")
    model = LlamaForCausalLM(config.model, max_model_len=64, dtype=torch.float16, device=meta)
    model.finalize()
    model.share_scratch(max_tokens)
    products = [module for module in model.modules() if isinstance(module, Int4Linear)]
    scratches = {id(layer.scratch): layer.scratch.nbytes for layer in products if layer.scratch is not None}
    assert len(scratches) == (max_tokens > 64 and capability < (9, 0))
    kept = sum(tensor.nbytes for tensor in model.state_dict().values()) + sum(scratches.values())
    kept += sum(layer.packed.num_bytes for layer in products if layer.packed is not None)
    assert kept == weight_bytes(config, torch.float16, meta)


def greedy_answers(name: str, prompts: list[list[int]], max_tokens: int, **options: object) -> list[list[int]]:
    """From an engine in this process, all prompts at once. Nothing is compiled once it is ready."""
    client = start_engine(name, {**OPTIONS, **options}, in_process=True)
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    answers: list[list[int]] = [[] for _ in prompts]
    try:
        for number, prompt in enumerate(prompts):
            client.submit(greedy_request(number, prompt, max_tokens), outputs.put)
        while any(len(answer) < max_tokens for answer in answers):
            output = outputs.get(timeout=120)
            assert output.finish_reason in (None, "length"), output
            answers[output.request_id] += output.token_ids
        assert client.stats().num_jit_compiles == 0
        client.check_integrity()
    finally:
        client.shutdown()
    return answers


def check_greedy(name: str, prompts: list[list[int]], answers: list[list[int]], tolerance: float) -> None:
    """Each token must be the choice of the dequantised weights after the tokens before it.

    tolerance: how far its logit may be below the largest, in standard deviations of all.
    """
    dense = Dequantized(RandomModel(name))
    runner = ModelRunner(dense, dense.engine_config(device="cpu", **OPTIONS))  # type: ignore[arg-type]
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = prompt_logits(runner, prompt + answer)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        assert (logits.max(dim=1).values - chosen).max() <= tolerance * logits.std()


def test_greedy_answers_on_a_cpu() -> None:
    name = "random:tiny:int4"
    prompts = [torch.randint(3, 320, (length,)).tolist() for length in (1, 17, 70)]
    check_greedy(name, prompts, greedy_answers(name, prompts, 5, device="cpu"), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_greedy_answers_on_a_gpu(dtype: str, enforce_eager: bool) -> None:
    """In graphs and out of them, alone and in batches, with prompts of many lengths."""
    name = "random:llama-150m:int4"
    prompts = [torch.randint(3, 32000, (length,)).tolist() for length in (1, 2, 17, 64, 65, 200, 700)]
    options: dict[str, object] = {"max_num_seqs": 5, "cache_max_entry_count": 100, "max_num_batched_tokens": 512}
    answers = greedy_answers(name, prompts, 40, dtype=dtype, enforce_eager=enforce_eager, **options)
    check_greedy(name, prompts, answers, {"fp16": 0.05, "bf16": 0.4}[dtype])


@pytest.mark.gpu
def test_memory_is_that_of_the_plan() -> None:
    """What was loaded is gone once it is repacked."""
    before = torch.cuda.memory_allocated()
    source = open_model("random:llama-150m:int4")
    options = {**OPTIONS, "enforce_eager": True, "max_num_batched_tokens": 512}
    runner = ModelRunner(source, source.engine_config(**options))
    packed = [weight for layer in runner.model.layers for weight in (layer.w13.packed, layer.w2.packed)]
    num_bytes = sum(weight.num_bytes for weight in packed)  # type: ignore[union-attr]
    assert 0.53 < num_bytes / (16 * 3 * 768 * 2048) < 0.54
    assert torch.cuda.memory_allocated() - before < runner.memory_plan.weights_bytes + (200 << 20)
