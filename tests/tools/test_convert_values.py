"""`tritonmind convert`: exact values and facts for every shape of Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import LLAMA3_ROPE, make_llama_checkpoint
from tests.converted import assert_same, expected_tensors, read_all

from tritonmind.config import RopeScaling
from tritonmind.workspace import Workspace
from tritonmind_tools.convert import convert

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_heads": 4, "num_kv_heads": 4},
    "gqa": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 10, "hidden": 48},
    "bias": {"attention_bias": True},
    "tied": {"tie": True},
    "sharded": {"shards": 4, "num_layers": 3},
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_are_the_checkpoints(tmp_path: Path, shape: str, tp: int) -> None:
    options = SHAPES[shape]
    model = make_llama_checkpoint(tmp_path / "checkpoint", **options)
    convert("tiny", tmp_path / "checkpoint", tmp_path / "workspace", tp=tp, weight_type="fp32")
    expected = expected_tensors(model.state_dict(), options.get("num_layers", 2), tp, options.get("tie", False))
    assert_same(read_all(tmp_path / "workspace"), expected)


@pytest.mark.parametrize(
    ("source", "weight_type", "stored"),
    [
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "auto", torch.float16),
        (torch.float32, "fp32", torch.float32),
        (torch.bfloat16, "fp16", torch.float16),
        (torch.float16, "bf16", torch.bfloat16),
    ],
)
def test_types(tmp_path: Path, source: torch.dtype, weight_type: str, stored: torch.dtype) -> None:
    model = make_llama_checkpoint(tmp_path / "checkpoint", dtype=source)
    convert("tiny", tmp_path / "checkpoint", tmp_path / "workspace", weight_type=weight_type)
    state = {name: tensor.to(stored) for name, tensor in model.state_dict().items()}
    assert_same(read_all(tmp_path / "workspace"), expected_tensors(state, 2, 1, False))


def test_configuration(tmp_path: Path) -> None:
    make_llama_checkpoint(
        tmp_path / "checkpoint",
        num_heads=6,
        num_kv_heads=3,
        head_dim=10,
        hidden=48,
        rope_theta=500000.0,
        rope_scaling=LLAMA3_ROPE,
        eos_token_id=[2, 0],
        max_position_embeddings=300,
    )
    convert("tiny", tmp_path / "checkpoint", tmp_path / "workspace", tp=3)
    workspace = Workspace.open(tmp_path / "workspace")
    model = workspace.model
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.hidden_size) == (6, 3, 10, 48)
    assert (model.bos_token_id, model.eos_token_ids) == (1, (2, 0))
    assert model.rope_theta == 500000.0 and model.rope_scaling == RopeScaling(**LLAMA3_ROPE)
    engine = workspace.engine_config()
    assert (engine.scheduler.max_model_len, engine.tensor_parallel_size) == (300, 3)
    assert {path.name for path in workspace.tokenizer_dir.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
