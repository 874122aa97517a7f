"""Which tensors a workspace has, above all of 4-bit weights, and which models and ranks they do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tritonmind.config import ModelConfig
from tritonmind.errors import ConfigError
from tritonmind.tensor_layout import common_tensor_specs, tensor_specs

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    model_name="tiny",
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
    qkv_bias=True,
    o_bias=True,
    weight_type="bf16",
    bos_token_id=1,
    eos_token_ids=(2, 3),
)
INT4 = dataclasses.replace(MODEL, hidden_size=64, intermediate_size=192, head_dim=16, weight_type="int4", group_size=32)


def test_tensors_of_4_bit_weights() -> None:
    model = dataclasses.replace(INT4, unquantized_type="bf16")
    layer = "layers.1"
    shapes = {
        f"{layer}.attention.w_qkv.1.qweight": ((64, 8), "I32"),
        f"{layer}.attention.w_qkv.1.qzeros": ((2, 8), "I32"),
        f"{layer}.attention.w_qkv.1.scales": ((2, 64), "F16"),
        f"{layer}.attention.w_qkv.1.bias": ((64,), "BF16"),
        f"{layer}.attention.wo.1.qweight": ((32, 8), "I32"),
        f"{layer}.attention.wo.1.qzeros": ((1, 8), "I32"),
        f"{layer}.attention.wo.1.scales": ((1, 64), "F16"),
        f"{layer}.feed_forward.w1.1.qweight": ((64, 12), "I32"),
        f"{layer}.feed_forward.w1.1.qzeros": ((2, 12), "I32"),
        f"{layer}.feed_forward.w1.1.scales": ((2, 96), "F16"),
        f"{layer}.feed_forward.w3.1.qweight": ((64, 12), "I32"),
        f"{layer}.feed_forward.w3.1.qzeros": ((2, 12), "I32"),
        f"{layer}.feed_forward.w3.1.scales": ((2, 96), "F16"),
        f"{layer}.feed_forward.w2.1.qweight": ((96, 8), "I32"),
        f"{layer}.feed_forward.w2.1.qzeros": ((3, 8), "I32"),
        f"{layer}.feed_forward.w2.1.scales": ((3, 64), "F16"),
    }
    specs = tensor_specs(model, 2, 1)
    assert {name: (s.shape, s.dtype) for name, s in specs.items() if name.startswith(layer)} == shapes
    assert {spec.dtype for spec in common_tensor_specs(model).values()} == {"BF16"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"group_size": 0}, "group_size=0 must be one of 32, 64, 128"),
        ({"group_size": 128}, "group_size=128 does not divide hidden_size=64: use 32 or 64$"),
        ({"hidden_size": 576, "group_size": 128}, "group_size=128 does not divide hidden_size=576: use 32 or 64$"),
        ({"intermediate_size": 176}, "does not divide intermediate_size=176: keep this model's weights in 16 bits"),
        ({"head_dim": 18, "num_heads": 16}, r"num_kv_heads\*head_dim=36 must be a multiple of 8"),
        ({"weight_type": "fp16"}, "group_size=32 must be 0 for weight_type=fp16"),
    ],
)
def test_groups_that_do_not_fit_the_model(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        dataclasses.replace(INT4, **changes)


@pytest.mark.parametrize(
    ("changes", "tp", "problem"),
    [
        (
            {"group_size": 64},
            2,
            r"tensor_para_size=2 cuts head_num\*size_per_head=64 of tiny into parts of 32, which are "
            "no whole groups of group_size=64: use fewer ranks",
        ),
        ({"intermediate_size": 96}, 2, "cuts inter_size=96 of tiny into parts of 48, .*groups of group_size=32"),
        ({"head_dim": 32, "num_heads": 8, "num_kv_heads": 8, "intermediate_size": 256}, 8, None),
        (
            {"head_dim": 4, "num_heads": 16},
            2,
            r"cuts kv_head_num\*size_per_head=8 of tiny into parts of 4, .*words of 8",
        ),
    ],
)
def test_ranks_take_whole_groups(changes: dict[str, Any], tp: int, problem: str | None) -> None:
    model = dataclasses.replace(INT4, **changes)
    if problem is None:
        assert tensor_specs(model, tp, 0)["layers.0.attention.wo.0.scales"].shape == (1, 64)
        return
    with pytest.raises(ConfigError, match=problem):
        tensor_specs(model, tp, 0)
