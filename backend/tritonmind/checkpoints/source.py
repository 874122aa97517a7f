"""What we need of a checkpoint, whatever its files are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from tritonmind.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"


Method = Literal["awq", "gptq"]


class SourceTensor(NamedTuple):
    """A tensor of a checkpoint: its shape, its safetensors dtype name, the file that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class Quantization(NamedTuple):
    """A checkpoint's own layout of 4-bit weights. zero_offset: what is added to the zeros that it stores."""

    method: Method
    group_size: int
    zero_offset: int = 0
    desc_act: bool = False


class Checkpoint(Protocol):
    """A checkpoint that is open. Its values are read when `read` is called."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @property
    def quantization(self) -> Quantization | None:
        """The layout of its 4-bit weights, None for weights that are not quantised. Raises CheckpointError."""
        ...

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """What it holds."""
        ...

    @property
    def main_dtype(self) -> str:
        """The safetensors dtype name that most of its elements have."""
        ...

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Elements start to stop of tensor `name` along `dim`, on the CPU."""
        ...

    def tokenizer_in_place(self) -> Path | None:
        """The directory where the tokenizer's files can be read as they are, None where `write_tokenizer` is needed."""
        ...

    def write_tokenizer(self, destination: Path, tokenizer_path: Path | None = None) -> None:
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
