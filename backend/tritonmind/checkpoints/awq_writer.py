"""Writes a checkpoint with 4-bit weights as AutoAWQ does, version gemm: Transformers, vLLM and we can read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from tritonmind.checkpoints.plan import expected_tensors, layer_number
from tritonmind.checkpoints.quantization import QUANTIZATION_CONFIG, awq_config
from tritonmind.checkpoints.source import CONFIG, GENERATION_CONFIG, SHARD_INDEX, SINGLE_FILE, Checkpoint, read_json
from tritonmind.config import ModelConfig
from tritonmind.errors import CheckpointError
from tritonmind.partial_directory import partial_directory
from tritonmind.tensor_layout import AWQ_KINDS, STORED_DTYPES, TensorSpec
from tritonmind.weight_files import ShardWriter, plan_shards

if TYPE_CHECKING:
    import torch

    from tritonmind.kernels.awq_format import AwqWeight

MAX_SHARD_BYTES = 2 << 30
_SHARD_PATTERN = "model-*-of-*.safetensors"
_FP16_REMEDY = "beside its 4-bit weights the AWQ checkpoint is fp16, so serve this model as it is, in bf16 or fp32"
_TORCH_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class AwqCheckpointWriter:
    """Writes into a directory that may hold other files, such as statistics; all of the checkpoint or none of it.

    A context manager. model: that of `source` with weight_type int4. Enter, call `write` for all of `names`, then
    `commit`. Leaving without commit removes what was written; an AWQ checkpoint that was there before stays until then.
    Raises CheckpointError for a directory that holds another checkpoint or has too little space.
    """

    def __init__(self, destination: Path, model: ModelConfig, source: Checkpoint) -> None:
        assert model.weight_type == "int4"
        self._destination = destination.absolute()
        self._model = model
        self._source = source
        _check_destination(self._destination, source.path)
        specs = [TensorSpec(name, shape, _dtype(name, model)) for name, shape in _layer_by_layer(model).items()]
        self.num_bytes = sum(spec.num_bytes for spec in specs)
        self._shards = list(plan_shards("model", specs, MAX_SHARD_BYTES).values())
        self._names = [spec.name for spec in specs]
        self._num_written = 0
        self._num_shards = 0
        self._last_names = {specs[-1].name for specs in self._shards}
        self._open: ShardWriter | None = None
        self._files = _file_names(len(self._shards))
        self._stack = ExitStack()
        self._made_destination = False

    @property
    def names(self) -> list[str]:
        """The tensors in the order of the files: the embedding, layer by layer, the last norm, the head."""
        return self._names

    def __enter__(self) -> AwqCheckpointWriter:
        self._made_destination = not self._destination.exists()
        self._destination.mkdir(parents=True, exist_ok=True)
        try:
            self._temporary = self._stack.enter_context(partial_directory(self._destination, "checkpoint"))
            free = shutil.disk_usage(self._destination).free
            if free < self.num_bytes:
                raise CheckpointError(
                    f"{self._destination} has {free / 1e9:.1f} GB free, the checkpoint needs "
                    f"{self.num_bytes / 1e9:.1f} GB: free some space or choose another directory"
                )
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.__exit__(kind, error, trace)
        self._clean_up()

    def write(self, tensors: Mapping[str, torch.Tensor | AwqWeight]) -> int:
        """Write the tensors that come next, in any order among themselves: a layer's, for one. Returns their bytes.

        A weight in 4 bits goes by the name of its module (model.layers.0.self_attn.q_proj), another tensor by its own;
        it is stored in the model's float type. Tensors are on any device.
        """
        from tritonmind.kernels.awq_format import AwqWeight

        flat: dict[str, torch.Tensor] = {}
        for name, value in tensors.items():
            if isinstance(value, AwqWeight):
                flat |= {f"{name}.{kind}": getattr(value, kind) for kind in AWQ_KINDS}
            else:
                flat[name] = value
        due = self._names[self._num_written : self._num_written + len(flat)]
        assert flat.keys() == set(due), f"{sorted(flat.keys() ^ set(due))}: not the tensors that come next"
        return sum(self._write(name, flat[name]) for name in due)

    def commit(self) -> None:
        """Write configuration, tokenizer and index and move everything into place, config.json last."""
        assert self._num_written == len(self._names), f"{self._names[self._num_written]} did not come"
        self._source.write_tokenizer(self._temporary)
        if not (self._temporary / GENERATION_CONFIG).is_file() and self._source.generation_config:
            _write_json(self._temporary / GENERATION_CONFIG, self._source.generation_config)
        if len(self._files) > 1:
            weight_map = {
                spec.name: file for file, specs in zip(self._files, self._shards, strict=True) for spec in specs
            }
            _write_json(
                self._temporary / SHARD_INDEX, {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            )
        _write_json(self._temporary / CONFIG, self._config())
        self._move_into_place()

    def _write(self, name: str, tensor: torch.Tensor) -> int:
        if self._open is None:
            number = self._num_shards
            self._open = ShardWriter(self._temporary / self._files[number], self._shards[number], _FP16_REMEDY)
            self._num_shards += 1
        size = self._open.write(name, [tensor.cpu()])
        self._num_written += 1
        if name in self._last_names:
            self._open.finish()
            self._open = None
        return size

    def _config(self) -> dict[str, object]:
        config = {key: value for key, value in self._source.config.items() if key not in ("dtype", "torch_dtype")}
        # Every Transformers knows the older name of the two.
        return {
            **config,
            "torch_dtype": _TORCH_NAMES[self._model.float_type],
            QUANTIZATION_CONFIG: awq_config(self._model.group_size),
        }

    def _move_into_place(self) -> None:
        (self._destination / CONFIG).unlink(missing_ok=True)
        for old in (SHARD_INDEX, SINGLE_FILE, *(path.name for path in self._destination.glob(_SHARD_PATTERN))):
            (self._destination / old).unlink(missing_ok=True)
        for path in sorted(self._temporary.iterdir(), key=lambda path: path.name == CONFIG):
            if path.is_dir():
                shutil.rmtree(self._destination / path.name, ignore_errors=True)
            path.replace(self._destination / path.name)
        self._made_destination = False

    def _clean_up(self) -> None:
        self._stack.close()
        if self._made_destination:
            shutil.rmtree(self._destination, ignore_errors=True)


def _layer_by_layer(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the checkpoint; a layer's come together, so that they can be written when the layer is done."""
    shapes = expected_tensors(model, "awq")
    numbers = {name: number for name in shapes if (number := layer_number(model, name)) is not None}
    in_order = sorted(numbers, key=numbers.__getitem__)
    first, *last = (name for name in shapes if name not in numbers)
    return {name: shapes[name] for name in (first, *in_order, *last)}


def _dtype(name: str, model: ModelConfig) -> str:
    if name.endswith(".scales"):
        return "F16"
    return "I32" if name.endswith((".qweight", ".qzeros")) else STORED_DTYPES[model.float_type]


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_destination(destination: Path, source: Path) -> None:
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is no directory: choose another one for the checkpoint")
    if destination.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise CheckpointError(f"{destination} is where the model itself is: choose another directory")
    if not (destination / CONFIG).is_file():
        weights = [name for name in (SHARD_INDEX, SINGLE_FILE) if (destination / name).exists()]
        weights += [path.name for path in destination.glob(_SHARD_PATTERN)]
        if weights:
            raise CheckpointError(f"{destination / weights[0]} exists without {CONFIG}: remove it yourself")
        return
    found = read_json(destination / CONFIG).get(QUANTIZATION_CONFIG)
    if not isinstance(found, dict) or found.get("quant_method") != awq_config(0)["quant_method"]:
        raise CheckpointError(
            f"{destination} holds a checkpoint that is not one of AWQ: choose another directory, or remove it yourself"
        )
