"""`tritonmind convert`: a Hugging Face checkpoint or a GGUF file becomes a workspace that the server serves."""

from __future__ import annotations

import argparse
import math
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from tritonmind.config import WeightType
from tritonmind.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tritonmind.config import ModelConfig
    from tritonmind.workspace_writer import WorkspaceWriter
    from tritonmind_tools.checkpoint import Checkpoint

DEFAULT_DESTINATION = Path("workspace")
DEFAULT_TP = 1
AUTO = "auto"
WEIGHT_TYPES = (AUTO, *(name for name in get_args(WeightType) if name != "int4"))
MODEL_FORMATS = ("hf",)

# fp32 checkpoints are served in fp16 unless asked otherwise: half the memory, and the GPU kernels' type.
_AUTO_WEIGHT_TYPE: dict[str, WeightType] = {"F16": "fp16", "BF16": "bf16", "F32": "fp16"}
_COMPARED_ROWS = 8192
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def register(subparsers: Any) -> None:
    """Add the command `convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="make a workspace from a checkpoint",
        description="Make a workspace from a Hugging Face checkpoint (safetensors) or a GGUF file.",
    )
    parser.add_argument("model_name", metavar="MODEL_NAME", help="name of the chat template, kept in config.ini")
    parser.add_argument("path", metavar="PATH", type=Path, help="checkpoint directory or .gguf file")
    parser.add_argument(
        "--model-format",
        choices=MODEL_FORMATS,
        default=MODEL_FORMATS[0],
        help="names of the tensors; a .gguf file is recognised by its name (default: %(default)s)",
    )
    parser.add_argument(
        "--dst-path", type=Path, default=DEFAULT_DESTINATION, help="workspace to write (default: ./%(default)s)"
    )
    parser.add_argument(
        "--tp", type=int, default=DEFAULT_TP, help="tensor-parallel ranks to split for (default: %(default)s)"
    )
    parser.add_argument("--tokenizer-path", type=Path, help="tokenizer directory (default: the checkpoint's)")
    parser.add_argument(
        "--weight-type",
        choices=WEIGHT_TYPES,
        default=AUTO,
        help="stored type; auto keeps fp16 and bf16 and makes fp32 to fp16 (default: %(default)s)",
    )
    parser.add_argument(
        "--triton-batch-dim", action="store_true", help="write max_batch_size 1, for clients that send shapes [1, 1]"
    )
    parser.add_argument("--force", action="store_true", help="replace the workspace at --dst-path")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command line's `convert`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"reading {args.path.name}", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, description="writing weights", completed=done, total=total)

        model = convert(
            args.model_name,
            args.path,
            args.dst_path,
            tp=args.tp,
            tokenizer_path=args.tokenizer_path,
            weight_type=args.weight_type,
            triton_batch_dim=args.triton_batch_dim,
            force=args.force,
            on_progress=on_progress,
        )
    print(
        f"{args.dst_path}: {model.architecture}, {model.num_layers} layers, {model.weight_type}, tp {args.tp}, "
        f"converted in {time.monotonic() - started:.1f} s"
    )
    return 0


def convert(
    model_name: str,
    path: Path,
    destination: Path = DEFAULT_DESTINATION,
    *,
    tp: int = DEFAULT_TP,
    tokenizer_path: Path | None = None,
    weight_type: str = AUTO,
    triton_batch_dim: bool = False,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ModelConfig:
    """Write the workspace `destination` from the checkpoint at `path`.

    `on_progress` is called with the bytes written so far and their total. Returns the model's configuration. Raises
    CheckpointError for a checkpoint that cannot be converted, ConfigError for options that do not fit it,
    WorkspaceError for a destination that must not be replaced. A conversion that fails leaves nothing behind.
    """
    from tritonmind.tensor_layout import check_tensor_parallel
    from tritonmind.workspace_writer import WorkspaceWriter, check_destination
    from tritonmind_tools.convert_plan import check_tensors

    if not _MODEL_NAME.fullmatch(model_name):
        raise ConfigError(f"MODEL_NAME={model_name!r} must consist of letters, digits, '.', '_' and '-'")
    check_destination(destination, force)
    try:
        checkpoint = _open_checkpoint(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
    with tempfile.TemporaryDirectory(prefix="tritonmind-") as staged:
        tokenizer_dir = Path(staged, "tokenizer")
        tokenizer_dir.mkdir()
        checkpoint.write_tokenizer(tokenizer_dir, tokenizer_path)
        model = _model_config(checkpoint, model_name, weight_type, tokenizer_dir)
        check_tensor_parallel(model, tp)
        check_tensors(model, checkpoint.tensors, path)
        with WorkspaceWriter(
            destination,
            model,
            session_len=model.max_position_embeddings,
            source_config=checkpoint.config,
            tensor_parallel_size=tp,
            triton_batch_dim=triton_batch_dim,
            force=force,
        ) as writer:
            shutil.copytree(tokenizer_dir, writer.tokenizer_dir, dirs_exist_ok=True)
            _write_weights(checkpoint, tp, model, writer, on_progress)
            writer.commit()
    return model


def _open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, a directory or a .gguf file.

    Raises CheckpointError when there is none, OSError when one of its files may not be read.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: give the directory of a downloaded checkpoint or a .gguf file "
            "(models are not downloaded by name)"
        )
    if path.is_dir():
        from tritonmind_tools.hf_checkpoint import HfCheckpoint

        return HfCheckpoint(path)
    if path.suffix.lower() == ".gguf":
        from tritonmind_tools.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    raise CheckpointError(f"{path} is neither a directory nor a .gguf file")


def _model_config(checkpoint: Checkpoint, model_name: str, weight_type: str, tokenizer_dir: Path) -> ModelConfig:
    from tritonmind_tools.checkpoint import CONFIG, GENERATION_CONFIG
    from tritonmind_tools.hf_config import check_architecture, model_config_from_hf, token_ids
    from tritonmind_tools.tokenizer_files import special_token_id

    where = checkpoint.path / CONFIG if checkpoint.path.is_dir() else checkpoint.path
    check_architecture(checkpoint.config, where)

    def special_ids(role: str) -> tuple[int, ...]:
        key = f"{role}_id"
        generation = token_ids(checkpoint.generation_config.get(key), checkpoint.path / GENERATION_CONFIG, key)
        from_tokenizer = special_token_id(tokenizer_dir, role)
        return generation or token_ids(checkpoint.config.get(key), where, key) or token_ids(from_tokenizer, where, key)

    eos_ids = special_ids("eos_token")
    if not eos_ids:
        raise CheckpointError(f"{where}: eos_token_id is neither there nor in {GENERATION_CONFIG} nor in the tokenizer")
    # Some models have no token that begins a text; start_id must be one, and nothing puts it before a prompt by itself.
    bos_ids = special_ids("bos_token") or eos_ids
    chosen = _AUTO_WEIGHT_TYPE[_main_dtype(checkpoint)] if weight_type == AUTO else cast(WeightType, weight_type)
    return model_config_from_hf(
        checkpoint.config,
        where,
        model_name=model_name,
        weight_type=chosen,
        bos_token_id=bos_ids[0],
        eos_token_ids=eos_ids,
    )


def _main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most elements of the checkpoint have: norms are sometimes kept in a wider one."""
    counts: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    dtype = max(counts, key=lambda name: counts[name], default="")
    if dtype not in _AUTO_WEIGHT_TYPE:
        raise CheckpointError(
            f"{checkpoint.path}: its tensors are {dtype or 'none'}, not one of {', '.join(_AUTO_WEIGHT_TYPE)}"
        )
    return dtype


def _write_weights(
    checkpoint: Checkpoint,
    tp: int,
    model: ModelConfig,
    writer: WorkspaceWriter,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    from tritonmind_tools.convert_plan import EMBEDDING, HEAD, conversion_plan

    if model.tie_word_embeddings and HEAD in checkpoint.tensors:
        _check_tied_head(checkpoint, EMBEDDING, HEAD)
    done = 0
    for step in conversion_plan(model, tp):
        done += writer.write(step.target, *(checkpoint.read(*part) for part in step.parts))
        if on_progress is not None:
            on_progress(done, writer.num_bytes)


def _check_tied_head(checkpoint: Checkpoint, embedding: str, head: str) -> None:
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
