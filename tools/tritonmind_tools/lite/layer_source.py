"""A checkpoint read one decoder layer at a time, in fp32, and what tells it from another one."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.checkpoints.plan import Part, Step, check_tensors, conversion_plan
from tritonmind.checkpoints.reading import model_config, open_checkpoint, read_blocks
from tritonmind.checkpoints.source import Checkpoint
from tritonmind.checkpoints.tokenizer_files import special_token_id
from tritonmind.errors import CheckpointError
from tritonmind.families import names_of
from tritonmind.hub import name_of
from tritonmind_tools.lite.decoder_layer import DecoderLayer

if TYPE_CHECKING:
    import torch

_RANKS = 1
_LAYERS = "layers."
# Differ between copies of one model without making another one of it.
_UNIMPORTANT_KEYS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")


class LayerSource:
    """A checkpoint opened for calibration: its layers are read when they are asked for, and not kept.

    Raises CheckpointError for a checkpoint that cannot be served, and for one that is quantised already.
    """

    def __init__(self, path: Path, *, allow_pickle: bool = False) -> None:
        self.path = path
        self.checkpoint: Checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
        _refuse_quantised(self.checkpoint)
        self.model = model_config(
            self.checkpoint,
            model_name=name_of(path),
            weight_type="fp32",
            special_token_id=lambda role: special_token_id(self.tokenizer_dir, role),
        )
        check_tensors(self.model, self.checkpoint.tensors, path)
        self._steps: dict[str, Step] = {step.target: step for step in conversion_plan(self.model, _RANKS)}

    @cached_property
    def tokenizer_dir(self) -> Path:
        """The tokenizer's files: the checkpoint's own directory, else one that lives as long as this object."""
        in_place = self.checkpoint.tokenizer_in_place()
        if in_place is not None:
            return in_place
        directory = Path(tempfile.mkdtemp(prefix="tritonmind-tokenizer-"))
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self.checkpoint.write_tokenizer(directory)
        return directory

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of tensor_layout, of rank 0 out of 1, in fp32 on the CPU."""
        import torch

        blocks = [block.float() for block in read_blocks(self.checkpoint.read, self._steps[name])]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def layer(self, number: int, cos_sin: torch.Tensor) -> DecoderLayer:
        """Decoder layer `number`, on the device of `cos_sin` [positions, head_dim]."""
        names = self._layer_names(number)
        tensors = {target: self.tensor(name).to(cos_sin.device) for name, target in names.items()}
        return DecoderLayer.from_tensors(self.model, cos_sin, tensors)

    def layer_parts(self, number: int) -> dict[str, tuple[Part, ...]]:
        """What each tensor of a layer is put together from: rows, or for wo and w2 all columns, of the checkpoint's."""
        return {target: self._steps[name].parts for name, target in self._layer_names(number).items()}

    def unlayered(self) -> dict[str, str]:
        """The tensors that belong to no layer, by their names in the checkpoint, in the order of a forward pass."""
        return {step.parts[0].source: name for name, step in self._steps.items() if not name.startswith(_LAYERS)}

    def _layer_names(self, number: int) -> dict[str, str]:
        """Names by tensor_layout of a layer's tensors, and the same without layer number and rank."""
        prefix = f"{_LAYERS}{number}."
        return {name: name.removeprefix(prefix).replace(".0.", ".") for name in self._steps if name.startswith(prefix)}

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of samples [N, T]: [N, T, hidden_size] fp32."""
        import torch

        # In the checkpoint's own type: only what is looked up becomes fp32, one sample after the other.
        table = self.checkpoint.read(names_of(self.model.architecture).embedding, 0, 0, self.model.vocab_size)
        hidden = torch.empty(*token_ids.shape, self.model.hidden_size)
        for sample, ids in zip(hidden, token_ids, strict=True):
            sample.copy_(table[ids.long()])
        return hidden

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and over name, shape and first row of every tensor.

        A row of each, not every byte: that takes a moment for a model of any size, and training changes all of them.
        """
        digest = hashlib.sha256(_canonical_config(self.checkpoint.config))
        by_file = sorted(self.checkpoint.tensors.items(), key=lambda item: (str(item[1].file.name), item[0]))
        rows = {name: self.checkpoint.read(name, 0, 0, 1).float() for name, _ in by_file}
        for name, row in sorted(rows.items()):
            digest.update(f"{name} {list(self.checkpoint.tensors[name].shape)}\n".encode())
            digest.update(row.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a checkpoint with quantised weights."""
    found = checkpoint.quantization  # raises for a method that nothing here can read
    if found is not None:
        raise CheckpointError(
            f"{checkpoint.path} is quantised already ({found.method}, 4 bits): "
            "give the fp16, bf16 or fp32 checkpoint that it was made from"
        )


def _canonical_config(config: Mapping[str, Any]) -> bytes:
    kept = {key: value for key, value in config.items() if key not in _UNIMPORTANT_KEYS}
    return json.dumps(kept, sort_keys=True).encode()
