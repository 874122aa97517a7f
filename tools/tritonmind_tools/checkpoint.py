"""What `convert` needs of a checkpoint, whatever its files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tritonmind.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


class SourceTensor(NamedTuple):
    """A tensor of a checkpoint: its shape, its safetensors dtype name, the file that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class Checkpoint(Protocol):
    """A checkpoint that is open. `tensors` lists what it holds; the values are read when `read` is called."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, SourceTensor]

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Elements start to stop of tensor `name` along `dim`, on the CPU."""
        ...

    def write_tokenizer(self, destination: Path, tokenizer_path: Path | None) -> None:
        """Put the tokenizer's files, from `tokenizer_path` when it is given, and generation_config.json there."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file. Raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data
