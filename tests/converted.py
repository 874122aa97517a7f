"""What a converted workspace must hold, by the definition of its tensors, and what it does hold."""

from __future__ import annotations

from pathlib import Path

import torch

from tritonmind.workspace import Workspace


def expected_tensors(state: dict[str, torch.Tensor], layers: int, tp: int, tied: bool) -> dict[str, torch.Tensor]:
    """The workspace's tensors by their definition, independently of the plan: fuse, then cut for each rank."""
    expected = {"tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    if not tied:
        expected["output.weight"] = state["lm_head.weight"]
    for i in range(layers):
        source, target = f"model.layers.{i}", f"layers.{i}"
        expected[f"{target}.attention_norm.weight"] = state[f"{source}.input_layernorm.weight"]
        expected[f"{target}.ffn_norm.weight"] = state[f"{source}.post_attention_layernorm.weight"]
        for r in range(tp):
            for kind in ("weight", "bias"):
                if f"{source}.self_attn.q_proj.{kind}" in state:
                    qkv = [state[f"{source}.self_attn.{name}_proj.{kind}"].chunk(tp)[r] for name in "qkv"]
                    expected[f"{target}.attention.w_qkv.{r}.{kind}"] = torch.cat(qkv)
            expected[f"{target}.attention.wo.{r}.weight"] = state[f"{source}.self_attn.o_proj.weight"].chunk(tp, 1)[r]
            expected[f"{target}.feed_forward.w1.{r}.weight"] = state[f"{source}.mlp.gate_proj.weight"].chunk(tp)[r]
            expected[f"{target}.feed_forward.w3.{r}.weight"] = state[f"{source}.mlp.up_proj.weight"].chunk(tp)[r]
            expected[f"{target}.feed_forward.w2.{r}.weight"] = state[f"{source}.mlp.down_proj.weight"].chunk(tp, 1)[r]
        if f"{source}.self_attn.o_proj.bias" in state:
            expected[f"{target}.attention.wo.0.bias"] = state[f"{source}.self_attn.o_proj.bias"]
    return expected


def read_all(root: Path) -> dict[str, torch.Tensor]:
    workspace = Workspace.open(root)
    tensors: dict[str, torch.Tensor] = {}
    for rank in range(workspace.engine_config().tensor_parallel_size):
        tensors |= workspace.tensors(rank)
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
