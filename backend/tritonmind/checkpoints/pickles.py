"""Weights in PyTorch's pickle files, for those who ask for it by --allow-pickle.

PyTorch's restricted unpickler is used, which builds tensors and containers and calls nothing else; the values stay on
the disk until they are read.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tritonmind.errors import CheckpointError

if TYPE_CHECKING:
    import torch

PATTERNS = ("*.bin", "*.pt", "*.pth")


class PickleFile:
    """The tensors of one file, read like one that safetensors has opened. Raises CheckpointError naming the file."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        # What a damaged file makes PyTorch raise depends on where it is damaged.
        except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
            cause = str(error).strip().splitlines()
            raise CheckpointError(
                f"{path} cannot be read as tensors in PyTorch's zip format: {cause[0] if cause else error!r}"
            ) from None
        if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
            raise CheckpointError(f"{path} holds something else than tensors by name")
        self.tensors: dict[str, torch.Tensor] = loaded

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def get_slice(self, name: str) -> PickleSlice:
        return PickleSlice(self.tensors[name])


class PickleSlice:
    """A tensor that is still on the disk: what is indexed is read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return dtype_name(self._tensor)

    def __getitem__(self, index: object) -> torch.Tensor:
        return self._tensor[index]  # type: ignore[index]


def dtype_name(tensor: torch.Tensor) -> str:
    """The safetensors name of the tensor's type, PyTorch's own where we do not read that type anyway."""
    import torch

    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
    return names.get(tensor.dtype, str(tensor.dtype))


def refusal(path: Path, file: str) -> CheckpointError:
    """Why a checkpoint whose weights are in `file` is not read without being asked to."""
    return CheckpointError(
        f"{path} holds its weights only as pickle ({file}), a format that can run code when loaded. If you trust where "
        "it is from, give --allow-pickle, which reads it with PyTorch's restricted unpickler"
    )
