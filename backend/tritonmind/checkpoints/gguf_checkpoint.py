"""A .gguf file as a checkpoint. Transformers' loader dequantises it and turns q and k back to rotate-half."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.checkpoints.source import GENERATION_CONFIG, SourceTensor
from tritonmind.checkpoints.tokenizer_files import collect_tokenizer
from tritonmind.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_MAGIC = b"GGUF"
# Transformers asks for the others only when it is half way through.
_PACKAGES = ("transformers", "gguf", "accelerate")


class GgufCheckpoint:
    """Unlike a directory it is held in memory whole, in fp32, once a tensor is asked for: the loader's only way."""

    main_dtype = "F32"
    quantization = None  # what the loader gives is dequantised

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise CheckpointError(f"{path} is no GGUF file: it does not begin with {_MAGIC.decode()}")
        with _loader(path) as transformers:
            config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            # Written beside the file only by those who unpack a whole repository.
            if (path.parent / GENERATION_CONFIG).is_file():
                generation = transformers.GenerationConfig.from_pretrained(path.parent)
            else:
                generation = transformers.GenerationConfig.from_model_config(config)
            architecture = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
        self.config: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        self.config |= {"architectures": [architecture], "dtype": "float32"}
        # The first names the types of the file, where what is read from here is dequantised; the other is a local path.
        for key in ("quantization_config", "_name_or_path"):
            self.config.pop(key, None)
        self.generation_config: dict[str, Any] = generation.to_diff_dict()

    @cached_property
    def tensors(self) -> dict[str, SourceTensor]:
        return {name: SourceTensor(tuple(tensor.shape), "F32", self.path) for name, tensor in self._state.items()}

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return self._state[name].narrow(dim, start, stop - start)

    @cached_property
    def _state(self) -> dict[str, torch.Tensor]:
        import torch

        with _loader(self.path) as transformers:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.path.parent, gguf_file=self.path.name, dtype=torch.float32
            )
        state: dict[str, torch.Tensor] = dict(model.state_dict())
        if self.config["tie_word_embeddings"]:
            del state["lm_head.weight"]
        return state

    def tokenizer_in_place(self) -> Path | None:
        return None

    def write_tokenizer(self, destination: Path, tokenizer_path: Path | None = None) -> None:
        if tokenizer_path is not None:
            collect_tokenizer(tokenizer_path, destination)
        else:
            with _loader(self.path) as transformers:
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            tokenizer.save_pretrained(destination)
        if self.generation_config:
            (destination / GENERATION_CONFIG).write_text(json.dumps(self.generation_config, indent=1) + "\n")


@contextlib.contextmanager
def _loader(path: Path) -> Iterator[Any]:
    """Transformers, its own progress bars and warnings kept off the terminal, its failures as CheckpointError."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(
                f"{path} is a GGUF file, which needs the package {package}: pip install 'tritonmind[gguf]'"
            )
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield transformers
    # A damaged file makes the loader raise whatever its parser stumbled over.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded by Transformers: {error}") from error
    finally:
        transformers.logging.set_verbosity(level)
