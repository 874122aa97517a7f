"""Opens a checkpoint and says what it is to us: its ModelConfig, and its tensors under the names of tensor_layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast, get_args

from tritonmind.checkpoints.hf_config import check_architecture, model_config_from_hf, token_ids
from tritonmind.checkpoints.plan import Step, check_tensors, conversion_plan
from tritonmind.checkpoints.source import CONFIG, GENERATION_CONFIG, Checkpoint, Method
from tritonmind.config import FloatType, ModelConfig, WeightType
from tritonmind.errors import CheckpointError, ConfigError
from tritonmind.families import names_of

if TYPE_CHECKING:
    import torch

AUTO = "auto"
WEIGHT_TYPES = (AUTO, *get_args(WeightType))
# What the weights of a checkpoint are: in a float type, or in one of the layouts of 4 bits.
FLOAT_FORMAT = "hf"
MODEL_FORMATS = (AUTO, FLOAT_FORMAT, *get_args(Method))
# Where weights are quantised while they are read.
DEFAULT_GROUP_SIZE = 128

# fp32 checkpoints are served in fp16 unless asked otherwise: half the memory, and the GPU kernels' type.
_AUTO_FLOAT_TYPE: dict[str, FloatType] = {"F16": "fp16", "BF16": "bf16", "F32": "fp16"}
_COMPARED_ROWS = 8192


def open_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint at `path`, a directory or a .gguf file. Raises CheckpointError naming what is wrong with it."""
    try:
        return _open(path, allow_pickle)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def _open(path: Path, allow_pickle: bool) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: give a checkpoint's directory, a .gguf file or a name on the Hugging Face hub, "
            "ORGANISATION/NAME"
        )
    if path.is_dir():
        from tritonmind.checkpoints.hf_checkpoint import HfCheckpoint
        from tritonmind.checkpoints.meta_checkpoint import PARAMS, MetaCheckpoint

        if (path / PARAMS).is_file() and not (path / CONFIG).is_file():
            return MetaCheckpoint(path, allow_pickle=allow_pickle)
        return HfCheckpoint(path, allow_pickle=allow_pickle)
    if path.suffix.lower() == ".gguf":
        from tritonmind.checkpoints.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    raise CheckpointError(f"{path} is neither a directory nor a .gguf file")


def model_config(
    checkpoint: Checkpoint,
    *,
    model_name: str,
    weight_type: str,
    special_token_id: Callable[[str], int | None],
    model_format: str = AUTO,
    group_size: int = 0,
) -> ModelConfig:
    """Facts of the checkpoint's model, its weights in `weight_type` (one of WEIGHT_TYPES).

    4-bit weights of the checkpoint stay in 4 bits: a float type is then that of everything else. special_token_id: what
    the tokenizer says about a role such as "bos_token", asked where the configuration says nothing. model_format (one
    of MODEL_FORMATS) and group_size (0: any) must be the checkpoint's. Raises CheckpointError for what cannot be
    served, by name, ConfigError for options that do not fit the checkpoint.
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
        **_stored_as(checkpoint, weight_type, model_format, group_size)._asdict(),
        bos_token_id=bos_ids[0],
        eos_token_ids=eos_ids,
    )


def read_weights(checkpoint: Checkpoint, model: ModelConfig, tp: int) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Every tensor of tensor_layout, in the order of its files, as the blocks of rows that make it up.

    Blocks have the checkpoint's own dtype and are read one tensor after the other. Raises CheckpointError, at once,
    naming the tensor that is missing, superfluous or of the wrong shape; later one that is damaged.
    """
    quantization = checkpoint.quantization
    check_tensors(model, checkpoint.tensors, checkpoint.path, quantization.method if quantization else None)
    names = names_of(model.architecture)
    if model.tie_word_embeddings and names.head in checkpoint.tensors:
        _check_tied_head(checkpoint, names.head, names.embedding)
    read: Callable[[str, int, int, int], torch.Tensor] = checkpoint.read
    if model.weight_type == "int4":
        from tritonmind.checkpoints import int4_readers

        read = int4_readers.reader(checkpoint, model)
    return ((step.target, read_blocks(read, step)) for step in conversion_plan(model, tp))


def read_blocks(read: Callable[[str, int, int, int], torch.Tensor], step: Step) -> list[torch.Tensor]:
    """The blocks of rows that make up a step's tensor. read: elements of a tensor, as Checkpoint.read gives them."""
    import torch

    blocks = [read(*part) for part in step.parts]
    if step.transform == "unit_rows":
        blocks = [torch.nn.functional.normalize(block.float()) for block in blocks]
    return blocks if step.dim == 0 or len(blocks) == 1 else [torch.cat(blocks, step.dim)]


class _Stored(NamedTuple):
    """How a workspace of the checkpoint stores its weights: fields of ModelConfig."""

    weight_type: WeightType
    group_size: int = 0
    unquantized_type: FloatType = "fp16"


def _stored_as(checkpoint: Checkpoint, weight_type: str, model_format: str, group_size: int) -> _Stored:
    path, quantization = checkpoint.path, checkpoint.quantization
    found = quantization.method if quantization else FLOAT_FORMAT
    if model_format not in (AUTO, found):
        remedy = f"use --model-format {found}"
        if quantization:
            raise ConfigError(f"--model-format {model_format}, but the weights of {path} are in 4 bits: {remedy}")
        raise ConfigError(
            f"--model-format {model_format}, but {path} has no 4-bit weights: {remedy}, with --weight-type int4 to "
            "round its weights"
        )
    if quantization and group_size not in (0, quantization.group_size):
        raise ConfigError(
            f"--group-size {group_size}, but {path} has groups of {quantization.group_size}: "
            f"use --group-size {quantization.group_size}"
        )
    if weight_type in get_args(FloatType):
        float_type = cast(FloatType, weight_type)
    else:
        # The main type of 4-bit weights is that of their words; what is in a float type begins with the embedding.
        names = names_of(check_architecture(checkpoint.config, path))
        embedding = checkpoint.tensors.get(names.embedding) if quantization else None
        float_type = _auto_float_type(path, embedding.dtype if embedding else checkpoint.main_dtype)
    if quantization:
        return _Stored("int4", quantization.group_size, float_type)
    if weight_type == "int4":
        return _Stored("int4", group_size or DEFAULT_GROUP_SIZE, float_type)
    if group_size:
        raise ConfigError(
            f"--group-size {group_size} is for 4-bit weights, and {path} has none: leave it out, or round its weights "
            "with --weight-type int4"
        )
    return _Stored(float_type)


def _auto_float_type(path: Path, dtype: str) -> FloatType:
    if dtype not in _AUTO_FLOAT_TYPE:
        raise CheckpointError(f"{path}: its tensors are {dtype or 'none'}, not one of {', '.join(_AUTO_FLOAT_TYPE)}")
    return _AUTO_FLOAT_TYPE[dtype]


def _check_tied_head(checkpoint: Checkpoint, head: str, embedding: str) -> None:
    rows = checkpoint.tensors[embedding].shape[0]
    same_shape = checkpoint.tensors[head].shape == checkpoint.tensors[embedding].shape
    for start in range(0, rows, _COMPARED_ROWS):
        stop = min(rows, start + _COMPARED_ROWS)
        if not same_shape or not checkpoint.read(head, 0, start, stop).equal(
            checkpoint.read(embedding, 0, start, stop)
        ):
            raise CheckpointError(
                f"{checkpoint.path}: tie_word_embeddings is true, but {head} is not the same as {embedding}: "
                "set tie_word_embeddings to false in config.json, or remove that tensor"
            )
