"""Opens a checkpoint and says what it is to us: its ModelConfig, and its tensors under the names of tensor_layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from tritonmind.checkpoints.hf_config import check_architecture, model_config_from_hf, token_ids
from tritonmind.checkpoints.plan import EMBEDDING, HEAD, check_tensors, conversion_plan
from tritonmind.checkpoints.source import CONFIG, GENERATION_CONFIG, Checkpoint
from tritonmind.config import ModelConfig, WeightType
from tritonmind.errors import CheckpointError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
WEIGHT_TYPES = (AUTO, *(name for name in get_args(WeightType) if name != "int4"))

# fp32 checkpoints are served in fp16 unless asked otherwise: half the memory, and the GPU kernels' type.
_AUTO_WEIGHT_TYPE: dict[str, WeightType] = {"F16": "fp16", "BF16": "bf16", "F32": "fp16"}
_COMPARED_ROWS = 8192


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, a directory or a .gguf file. Raises CheckpointError naming what is wrong with it."""
    try:
        return _open(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: give the directory of a downloaded checkpoint or a .gguf file "
            "(models are not downloaded by name)"
        )
    if path.is_dir():
        from tritonmind.checkpoints.hf_checkpoint import HfCheckpoint

        return HfCheckpoint(path)
    if path.suffix.lower() == ".gguf":
        from tritonmind.checkpoints.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    raise CheckpointError(f"{path} is neither a directory nor a .gguf file")


def model_config(
    checkpoint: Checkpoint, *, model_name: str, weight_type: str, special_token_id: Callable[[str], int | None]
) -> ModelConfig:
    """Facts of the checkpoint's model, its weights in `weight_type` (one of WEIGHT_TYPES).

    special_token_id: what the tokenizer says about a role such as "bos_token", asked where the configuration says
    nothing. Raises CheckpointError for what cannot be served, by name.
    """
    where = checkpoint.path / CONFIG if checkpoint.path.is_dir() else checkpoint.path
    check_architecture(checkpoint.config, where)

    def special_ids(role: str) -> tuple[int, ...]:
        key = f"{role}_id"
        return (
            token_ids(checkpoint.generation_config.get(key), checkpoint.path / GENERATION_CONFIG, key)
            or token_ids(checkpoint.config.get(key), where, key)
            or token_ids(special_token_id(role), where, key)
        )

    eos_ids = special_ids("eos_token")
    if not eos_ids:
        raise CheckpointError(f"{where}: eos_token_id is neither there nor in {GENERATION_CONFIG} nor in the tokenizer")
    # Some models have no token that begins a text; start_id must be one, and nothing puts it before a prompt by itself.
    bos_ids = special_ids("bos_token") or eos_ids
    return model_config_from_hf(
        checkpoint.config,
        where,
        model_name=model_name,
        weight_type=_auto_weight_type(checkpoint) if weight_type == AUTO else cast(WeightType, weight_type),
        bos_token_id=bos_ids[0],
        eos_token_ids=eos_ids,
    )


def read_weights(checkpoint: Checkpoint, model: ModelConfig, tp: int) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Every tensor of tensor_layout, in the order of its files, as the blocks of rows that make it up.

    Blocks have the checkpoint's own dtype and are read one tensor after the other. Raises CheckpointError, at once,
    naming the tensor that is missing, superfluous or of the wrong shape; later one that is damaged.
    """
    check_tensors(model, checkpoint.tensors, checkpoint.path)
    if model.tie_word_embeddings and HEAD in checkpoint.tensors:
        _check_tied_head(checkpoint)
    return ((step.target, [checkpoint.read(*part) for part in step.parts]) for step in conversion_plan(model, tp))


def _auto_weight_type(checkpoint: Checkpoint) -> WeightType:
    dtype = checkpoint.main_dtype
    if dtype not in _AUTO_WEIGHT_TYPE:
        raise CheckpointError(
            f"{checkpoint.path}: its tensors are {dtype or 'none'}, not one of {', '.join(_AUTO_WEIGHT_TYPE)}"
        )
    return _AUTO_WEIGHT_TYPE[dtype]


def _check_tied_head(checkpoint: Checkpoint) -> None:
    rows = checkpoint.tensors[EMBEDDING].shape[0]
    same_shape = checkpoint.tensors[HEAD].shape == checkpoint.tensors[EMBEDDING].shape
    for start in range(0, rows, _COMPARED_ROWS):
        stop = min(rows, start + _COMPARED_ROWS)
        if not same_shape or not checkpoint.read(HEAD, 0, start, stop).equal(
            checkpoint.read(EMBEDDING, 0, start, stop)
        ):
            raise CheckpointError(
                f"{checkpoint.path}: tie_word_embeddings is true, but {HEAD} is not the same as {EMBEDDING}: "
                "set tie_word_embeddings to false in config.json, or remove that tensor"
            )
