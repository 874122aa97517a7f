"""A Hugging Face directory as a checkpoint: config.json, safetensors files read lazily, tokenizer files."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.checkpoints.pickles import PATTERNS, PickleFile, refusal
from tritonmind.checkpoints.quantization import QUANTIZATION_CONFIG, quantization_of
from tritonmind.checkpoints.source import (
    CONFIG,
    GENERATION_CONFIG,
    SHARD_INDEX,
    SINGLE_FILE,
    Quantization,
    SourceTensor,
    read_json,
)
from tritonmind.checkpoints.tokenizer_files import collect_tokenizer, has_tokenizer
from tritonmind.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# AutoGPTQ wrote it beside config.json before that had a place for it.
_GPTQ_CONFIG = "quantize_config.json"
# The system reads some of it at once: pieces keep it to the file's order.
_AHEAD_BYTES = 16 << 20
_PICKLE_SINGLE = "pytorch_model.bin"
_PICKLE_INDEX = "pytorch_model.bin.index.json"
_PICKLE_SUFFIXES = tuple(Path(pattern).suffix for pattern in PATTERNS)


class HfCheckpoint:
    """A directory with config.json and safetensors files. Tensors stay on the disk until they are read."""

    def __init__(self, path: Path, *, allow_pickle: bool = False) -> None:
        self.path = path
        self._allow_pickle = allow_pickle
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path} has no {CONFIG}: it is not the directory of a Hugging Face checkpoint")
        self.config = read_json(path / CONFIG)
        if not self.config.get(QUANTIZATION_CONFIG) and (path / _GPTQ_CONFIG).is_file():
            self.config[QUANTIZATION_CONFIG] = {"quant_method": "gptq", **read_json(path / _GPTQ_CONFIG)}
        generation = path / GENERATION_CONFIG
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self._open_file: tuple[Path, Any] | None = None
        self._asked: set[Path] = set()
        self.tensors: dict[str, SourceTensor] = {}
        for file, indexed in self._weight_files().items():
            self._scan(file, indexed)

    @cached_property
    def quantization(self) -> Quantization | None:
        return quantization_of(self.config, self.tensors, self.path / CONFIG)

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        from safetensors import SafetensorError

        file = self.tensors[name].file
        self._ask_ahead(file)
        try:
            view = self._handle(file).get_slice(name)
            tensor: torch.Tensor = view[start:stop] if dim == 0 else view[:, start:stop]
            return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error}") from None

    @property
    def main_dtype(self) -> str:
        """Norms are sometimes kept in a wider type than the rest, so the elements are counted. "" without a tensor."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += math.prod(tensor.shape)
        return max(counts, key=lambda name: counts[name], default="")

    def tokenizer_in_place(self) -> Path | None:
        return self.path if has_tokenizer(self.path) else None

    def write_tokenizer(self, destination: Path, tokenizer_path: Path | None = None) -> None:
        collect_tokenizer(tokenizer_path or self.path, destination)
        generation = self.path / GENERATION_CONFIG
        if generation.is_file():
            (destination / GENERATION_CONFIG).write_bytes(generation.read_bytes())

    def _weight_files(self) -> dict[Path, set[str] | None]:
        """Each weight file with the names that the shard index gives it (None without an index)."""
        pickles = sorted(file.name for pattern in PATTERNS for file in self.path.glob(pattern))
        for index_name, single in ((SHARD_INDEX, SINGLE_FILE), (_PICKLE_INDEX, _PICKLE_SINGLE)):
            index = self.path / index_name
            if not index.is_file() and not (self.path / single).is_file():
                continue
            if single == _PICKLE_SINGLE and not self._allow_pickle:
                raise refusal(self.path, pickles[0] if pickles else index_name)
            return self._indexed(index) if index.is_file() else {self.path / single: None}
        if pickles:
            raise refusal(self.path, pickles[0])
        raise CheckpointError(f"{self.path} has neither {SINGLE_FILE} nor {SHARD_INDEX}")

    def _indexed(self, index: Path) -> dict[Path, set[str] | None]:
        self._index_name = index.name
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map")
        files: dict[Path, set[str] | None] = {}
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise CheckpointError(f"{index}: {file_name!r}, the file of {name}, is no plain file name")
            names = files.setdefault(self.path / file_name, set())
            assert names is not None
            names.add(name)
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing, but {index.name} names it")
        return files

    def _scan(self, file: Path, indexed: set[str] | None) -> None:
        from safetensors import SafetensorError

        file.open("rb").close()  # safetensors says of a file that may not be read that there is none
        try:
            handle = self._handle(file)
            names = set(handle.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or truncated: {error}") from None
        if indexed is not None and names != indexed:
            odd = min(names ^ indexed)
            side = "it is not in the file" if odd in indexed else f"{self._index_name} does not list it there"
            raise CheckpointError(f"{file}: tensor {odd}: {side}")
        for name in names:
            view = handle.get_slice(name)
            self.tensors[name] = SourceTensor(tuple(view.get_shape()), view.get_dtype(), file)

    def _ask_ahead(self, file: Path) -> None:
        """Have the whole file read into the page cache: a mapped file is otherwise read a few pages at a time."""
        if file not in self._asked:
            self._asked.add(file)
            threading.Thread(target=_read_ahead, args=(file,), name="read-ahead", daemon=True).start()

    def _handle(self, file: Path) -> Any:
        """The open file; only one at a time, so that no more than one shard is ever mapped."""
        from safetensors import safe_open

        if self._open_file is None or self._open_file[0] != file:
            self._open_file = None
            is_pickle = file.suffix in _PICKLE_SUFFIXES
            self._open_file = (file, PickleFile(file) if is_pickle else safe_open(file, framework="pt"))
        return self._open_file[1]


def _read_ahead(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("rb") as opened:  # who reads it says what is wrong with it
        for offset in range(0, file.stat().st_size, _AHEAD_BYTES):
            os.posix_fadvise(opened.fileno(), offset, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
