"""A .gguf file as a checkpoint. Transformers' loader dequantises it and turns q and k back to rotate-half."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.errors import CheckpointError
from tritonmind_tools.checkpoint import GENERATION_CONFIG, SourceTensor
from tritonmind_tools.tokenizer_files import collect_tokenizer

if TYPE_CHECKING:
    import torch

_MAGIC = b"GGUF"
# Transformers asks for the others only when it is half way through.
_PACKAGES = ("transformers", "gguf", "accelerate")


class GgufCheckpoint:
    """Unlike a directory it is held in memory whole, in fp32: the loader has no other way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise CheckpointError(f"{path} is no GGUF file: it does not begin with {_MAGIC.decode()}")
        transformers = _import_transformers(path)
        import torch

        try:
            with _quiet(transformers):
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    path.parent, gguf_file=path.name, dtype=torch.float32
                )
        # A damaged file makes the loader raise whatever its parser stumbled over.
        except Exception as error:
            raise CheckpointError(f"{path} cannot be loaded by Transformers: {error}") from error
        self.config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
        self.config["architectures"] = [type(model).__name__]
        # The first names the types of the file, where what is read from here is dequantised; the other is a local path.
        for key in ("quantization_config", "_name_or_path"):
            self.config.pop(key, None)
        self.generation_config: dict[str, Any] = model.generation_config.to_diff_dict()
        self._state: dict[str, torch.Tensor] = dict(model.state_dict())
        if self.config["tie_word_embeddings"]:
            del self._state["lm_head.weight"]
        self.tensors = {name: SourceTensor(tuple(tensor.shape), "F32", path) for name, tensor in self._state.items()}

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return self._state[name].narrow(dim, start, stop - start)

    def write_tokenizer(self, destination: Path, tokenizer_path: Path | None) -> None:
        if tokenizer_path is not None:
            collect_tokenizer(tokenizer_path, destination)
        else:
            transformers = _import_transformers(self.path)
            with _quiet(transformers):
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            tokenizer.save_pretrained(destination)
        if self.generation_config:
            (destination / GENERATION_CONFIG).write_text(json.dumps(self.generation_config, indent=1) + "\n")


def _import_transformers(path: Path) -> Any:
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(
                f"{path} is a GGUF file, which needs the package {package}: pip install 'tritonmind[gguf]'"
            )
    import transformers

    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep the loader's own progress bars and warnings off the terminal: `convert` has a bar of its own."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)
