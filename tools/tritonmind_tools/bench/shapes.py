"""The name that a model's sizes have in results."""

from __future__ import annotations

from tritonmind.config import ModelConfig
from tritonmind.random_model import SHAPES, Shape, known_shape

__all__ = ["SHAPES", "Shape", "known_shape", "shape_name"]


def shape_name(model: ModelConfig) -> str:
    """The name of the shape that `model` has, else the model's own name."""
    for name, shape in SHAPES.items():
        # How far positions go does not change what a token costs.
        if all(getattr(model, field) == getattr(shape, field) for field in Shape._fields[:-1]):
            return name
    return model.model_name
