"""A directory as Meta publishes Llama 1, Llama 2 and CodeLlama: params.json, consolidated.NN.pth, tokenizer.model.

Each file holds one model-parallel rank's share of every tensor. Here they are whole, under Hugging Face's names, with
the rows of q and k in the order of a rotation by halves: Meta turns neighbours (2j, 2j + 1), we (j, j + head_dim / 2).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.checkpoints.hf_config import ConfigReader
from tritonmind.checkpoints.pickles import PickleFile, dtype_name, refusal
from tritonmind.checkpoints.source import SourceTensor, read_json
from tritonmind.checkpoints.tokenizer_files import collect_tokenizer, has_tokenizer
from tritonmind.errors import CheckpointError

if TYPE_CHECKING:
    import torch

PARAMS = "params.json"
_SHARDS = "consolidated.*.pth"
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
# Meta's name within a layer, to Hugging Face's and the dimension that ranks share.
_IN_LAYER: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
_EMBEDDING = "tok_embeddings.weight"
_GATE = "layers.0.feed_forward.w1.weight"
_OUTSIDE: dict[str, tuple[str, int | None]] = {
    _EMBEDDING: ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
# Rotary frequencies, which follow from the configuration.
_DERIVED = re.compile(r"(.*\.)?rope\.freqs")
_KNOWN_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size",
    "rope_theta", "max_seq_len", "max_batch_size",
}  # fmt: skip
# params.json does not say what length a model was trained for; its other values tell the generations apart.
_LLAMA1_LENGTH, _LLAMA2_LENGTH, _CODELLAMA_LENGTH = 2048, 4096, 16384


class MetaCheckpoint:
    """The checkpoint in the directory `path`. Raises CheckpointError naming what is wrong with it."""

    quantization = None
    generation_config: dict[str, Any] = {}  # noqa: RUF012 - never written to

    def __init__(self, path: Path, *, allow_pickle: bool) -> None:
        self.path = path
        files = sorted(path.glob(_SHARDS))
        if not files:
            raise CheckpointError(f"{path} has {PARAMS}, but no {_SHARDS}")
        if not allow_pickle:
            raise refusal(path, files[0].name)
        self._reader = ConfigReader(read_json(path / PARAMS), path / PARAMS)
        if unknown := sorted(self._reader.config.keys() - _KNOWN_PARAMS):
            raise CheckpointError(
                f"{path / PARAMS}: {unknown[0]}={self._reader.config[unknown[0]]!r} is not supported in this format: "
                "take the model's Hugging Face checkpoint"
            )
        self._files = [PickleFile(file) for file in files]
        self._names = self._map_names()
        self.config = self._config()

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        return {name: self._source(name) for name in self._names}

    @property
    def main_dtype(self) -> str:
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += math.prod(tensor.shape)
        return max(counts, key=lambda name: counts[name], default="")

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return self._whole(name).narrow(dim, start, stop - start)

    def tokenizer_in_place(self) -> Path | None:
        return self.path if has_tokenizer(self.path) else None

    def write_tokenizer(self, destination: Path, tokenizer_path: Path | None = None) -> None:
        # In Meta's archives the tokenizer lies beside the models' directories.
        beside = self.path if has_tokenizer(self.path) else self.path.parent
        collect_tokenizer(tokenizer_path or (beside if has_tokenizer(beside) else self.path), destination)

    def _map_names(self) -> dict[str, tuple[str, int | None]]:
        """Hugging Face's name to Meta's, and the dimension that the files share."""
        names: dict[str, tuple[str, int | None]] = {}
        for name in self._files[0].keys():  # noqa: SIM118 - a file is no mapping
            match = _LAYER.fullmatch(name)
            if _DERIVED.fullmatch(name):
                continue
            if name in _OUTSIDE:
                theirs, dim = _OUTSIDE[name]
            elif match and match[2] in _IN_LAYER:
                inner, dim = _IN_LAYER[match[2]]
                theirs = f"model.layers.{match[1]}.{inner}.weight"
            else:
                raise CheckpointError(f"{self._files[0].path}: tensor {name} is not one of Meta's Llama")
            names[theirs] = (name, dim)
            for file in self._files:
                if name not in file.tensors:
                    raise CheckpointError(f"{file.path}: tensor {name} is missing, which {self._files[0].path} has")
        return names

    def _source(self, name: str) -> SourceTensor:
        original, dim = self._names[name]
        parts = [file.tensors[original] for file in self._files]
        if len({(part.dtype, part.shape) for part in parts}) > 1:
            raise CheckpointError(f"{self.path}: tensor {original} differs in shape or type between the files")
        shape = list(parts[0].shape)
        if dim is not None and dim < len(shape):
            shape[dim] *= len(parts)
        return SourceTensor(tuple(shape), dtype_name(parts[0]), self._files[0].path)

    def _whole(self, name: str) -> torch.Tensor:
        import torch

        original, dim = self._names[name]
        parts = [file.tensors[original] for file in self._files]
        whole = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            rows, columns = whole.shape
            heads = rows // (self.config["hidden_size"] // self.config["num_attention_heads"])
            whole = whole.view(heads, -1, 2, columns).transpose(1, 2).reshape(rows, columns)
        return whole

    def _config(self) -> dict[str, Any]:
        """The same facts as a Hugging Face config.json has them. The sizes that tensors have are theirs."""
        reader = self._reader
        for name in (_EMBEDDING, _GATE):
            if name not in self._files[0].tensors:
                raise CheckpointError(f"{self._files[0].path}: tensor {name} is missing")
        heads, eps = reader.get("n_heads", int), reader.get("norm_eps", float)
        theta = reader.get("rope_theta", float, 10000.0)
        length = _CODELLAMA_LENGTH if theta >= 1e6 else _LLAMA1_LENGTH if eps < 5e-6 else _LLAMA2_LENGTH
        return {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": reader.get("dim", int),
            "num_hidden_layers": reader.get("n_layers", int),
            "num_attention_heads": heads,
            "num_key_value_heads": reader.get("n_kv_heads", int, heads),
            "intermediate_size": self._source("model.layers.0.mlp.gate_proj.weight").shape[0],
            "vocab_size": self._source(_OUTSIDE[_EMBEDDING][0]).shape[0],
            "rms_norm_eps": eps,
            "rope_theta": theta,
            "max_position_embeddings": length,
            "tie_word_embeddings": False,
        }
