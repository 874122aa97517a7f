"""Sizes of known Llama models, by the names that `tritonmind bench` takes."""

from __future__ import annotations

from typing import NamedTuple

from tritonmind.config import ModelConfig


class Shape(NamedTuple):
    """Sizes of a Llama model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256, 8192),
    # No known model: enough layers and heads that a test on a card works it as it would a large one.
    "llama-150m": Shape(768, 2048, 16, 12, 4, 32000, 4096),
    # For trying a command out, on a CPU too.
    "tiny": Shape(64, 96, 2, 4, 2, 320, 512),
}


def shape_name(model: ModelConfig) -> str:
    """The name of the shape that `model` has, else the model's own name."""
    for name, shape in SHAPES.items():
        # How far positions go does not change what a token costs.
        if all(getattr(model, field) == getattr(shape, field) for field in Shape._fields[:-1]):
            return name
    return model.model_name
