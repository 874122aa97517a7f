"""`tritonmind convert`: a Hugging Face checkpoint or a GGUF file becomes a workspace that the server serves."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.checkpoints.reading import AUTO, DEFAULT_GROUP_SIZE, MODEL_FORMATS, WEIGHT_TYPES
from tritonmind.config import GROUP_SIZES
from tritonmind.errors import CheckpointError, ConfigError
from tritonmind_tools.termination import sigterm_interrupts

if TYPE_CHECKING:
    import torch

    from tritonmind.config import ModelConfig
    from tritonmind.workspace_writer import WorkspaceWriter

DEFAULT_DESTINATION = Path("workspace")
DEFAULT_TP = 1

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def register(subparsers: Any) -> None:
    """Add the command `convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="make a workspace from a checkpoint",
        description="Make a workspace from a checkpoint: a Hugging Face folder, Meta's files, or a GGUF file.",
    )
    parser.add_argument(
        "model_name",
        metavar="MODEL_NAME",
        help="name of the model, kept in config.ini; one that `tritonmind list` prints gives a checkpoint without chat "
        "template that one",
    )
    parser.add_argument(
        "path", metavar="PATH", help="checkpoint directory, .gguf file, or ORGANISATION/NAME on the Hugging Face hub"
    )
    parser.add_argument(
        "--model-format",
        choices=MODEL_FORMATS,
        default=AUTO,
        help="what the weights are: hf in 16 or 32 bits, awq or gptq in 4; another than the checkpoint's is an error "
        "(default: %(default)s, the checkpoint's)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(0, *GROUP_SIZES),
        default=0,
        help="4-bit weights that share a scale; another than the checkpoint's is an error (default: the checkpoint's, "
        f"{DEFAULT_GROUP_SIZE} with --weight-type int4)",
    )
    parser.add_argument(
        "--dst-path", type=Path, default=DEFAULT_DESTINATION, help="workspace to write (default: ./%(default)s)"
    )
    parser.add_argument(
        "--tp", type=int, default=DEFAULT_TP, help="tensor-parallel ranks to split for (default: %(default)s)"
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="chat template in Jinja or LMDeploy's JSON, or a name that `tritonmind list` prints (default: the "
        "checkpoint's own, else the one that MODEL_NAME names)",
    )
    parser.add_argument("--tokenizer-path", type=Path, help="tokenizer directory (default: the checkpoint's)")
    parser.add_argument(
        "--weight-type",
        choices=WEIGHT_TYPES,
        default=AUTO,
        help="stored type; auto keeps 4 bits, fp16 and bf16 and makes fp32 to fp16; int4 rounds to the nearest of 16 "
        "levels in each group; beside weights that are in 4 bits, another type is that of all the rest "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--triton-batch-dim", action="store_true", help="write max_batch_size 1, for clients that send shapes [1, 1]"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read weights in PyTorch's pickle files (.bin, Meta's .pth), with its restricted unpickler",
    )
    parser.add_argument("--force", action="store_true", help="replace the workspace at --dst-path")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command line's `convert`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from tritonmind.hub import local_model

    path = local_model(args.path, allow_pickle=args.allow_pickle).path
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with sigterm_interrupts(), Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"reading {args.path}", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, description="writing weights", completed=done, total=total)

        warnings: list[str] = []
        model = convert(
            args.model_name,
            path,
            args.dst_path,
            tp=args.tp,
            tokenizer_path=args.tokenizer_path,
            chat_template=args.chat_template,
            weight_type=args.weight_type,
            model_format=args.model_format,
            group_size=args.group_size,
            triton_batch_dim=args.triton_batch_dim,
            allow_pickle=args.allow_pickle,
            force=args.force,
            on_progress=on_progress,
            on_warning=warnings.append,
        )
    for warning in warnings:
        print(f"tritonmind: warning: {warning}", file=sys.stderr)
    groups = f" in groups of {model.group_size}" if model.group_size else ""
    print(
        f"{args.dst_path}: {model.architecture}, {model.num_layers} layers, {model.weight_type}{groups}, tp {args.tp}, "
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
    chat_template: str | None = None,
    weight_type: str = AUTO,
    model_format: str = AUTO,
    group_size: int = 0,
    triton_batch_dim: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_warning: Callable[[str], None] = lambda text: None,
) -> ModelConfig:
    """Write the workspace `destination` from the checkpoint at `path`.

    weight_type, model_format and group_size are those of `checkpoints.reading.model_config`, chat_template is the
    `given` of `template_choice.choose_template`. `on_progress` is called with the bytes written so far and their total,
    `on_warning` with what the user should know. Returns the model's configuration. Raises CheckpointError for a
    checkpoint that cannot be converted, ConfigError for options that do not fit it, WorkspaceError for a destination
    that must not be replaced. A conversion that fails leaves nothing behind.
    """
    from tritonmind.checkpoints.reading import model_config, open_checkpoint, read_weights
    from tritonmind.checkpoints.tokenizer_files import special_token_id
    from tritonmind.named_templates import contradiction
    from tritonmind.template_choice import choose_template
    from tritonmind.tensor_layout import check_tensor_parallel
    from tritonmind.workspace import is_workspace
    from tritonmind.workspace_writer import WorkspaceWriter, check_destination

    if not _MODEL_NAME.fullmatch(model_name):
        raise ConfigError(f"MODEL_NAME={model_name!r} must consist of letters, digits, '.', '_' and '-'")
    check_destination(destination, force)
    if is_workspace(path):
        raise CheckpointError(f"{path} is a workspace already: serve it, or give the checkpoint that it was made of")
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
    with tempfile.TemporaryDirectory(prefix="tritonmind-") as staged:
        tokenizer_dir = Path(staged, "tokenizer")
        tokenizer_dir.mkdir()
        checkpoint.write_tokenizer(tokenizer_dir, tokenizer_path)
        model = model_config(
            checkpoint,
            model_name=model_name,
            weight_type=weight_type,
            model_format=model_format,
            group_size=group_size,
            special_token_id=partial(special_token_id, tokenizer_dir),
        )
        if (odd := contradiction(model_name, checkpoint.config["architectures"][0])) is not None:
            on_warning(odd)
        template = choose_template(tokenizer_dir, model_name=model_name, given=chat_template)
        template.write(tokenizer_dir)
        for warning in template.warnings:
            on_warning(warning)
        model = dataclasses.replace(model, eos_token_ids=template.end_tokens(model))
        check_tensor_parallel(model, tp)
        weights = read_weights(checkpoint, model, tp)
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
            _write_weights(weights, writer, on_progress)
            writer.commit()
    return model


def _write_weights(
    weights: Iterable[tuple[str, list[torch.Tensor]]],
    writer: WorkspaceWriter,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    done = 0
    for name, blocks in weights:
        done += writer.write(name, *blocks)
        if on_progress is not None:
            on_progress(done, writer.num_bytes)
