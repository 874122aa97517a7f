"""Writes a workspace: weights as a stream, the rest from the templates, everything at once into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from tritonmind import __version__
from tritonmind.config import ModelConfig, to_dict
from tritonmind.config_ini import render_config_ini
from tritonmind.errors import WorkspaceError
from tritonmind.partial_directory import partial_directory
from tritonmind.resources import resource
from tritonmind.tensor_layout import KV_SCALES_FILE, TensorSpec, common_tensor_specs, kv_scale_specs, tensor_specs
from tritonmind.weight_files import CHUNK_BYTES, FORMAT_VERSION, INDEX_NAME, ShardWriter, WeightIndex, plan_shards
from tritonmind.workspace import CONFIG_INI, MODEL_DIR, MODEL_JSON, VERSION, Workspace, is_workspace

if TYPE_CHECKING:
    import torch

SERVICE_SCRIPT = "service_docker_up.sh"
DOCKER_IMAGE = f"tritonmind:{__version__}"


class WorkspaceWriter:
    """Writes a workspace beside its destination and renames it into place when all is there. A context manager.

    Enter, fill `tokenizer_dir`, call `write` for every tensor of tensor_layout in its order (common and ranks may
    interleave), then `commit`. Leaving without commit removes what was written.
    """

    def __init__(
        self,
        destination: Path,
        model: ModelConfig,
        *,
        session_len: int,
        source_config: dict[str, Any],
        tensor_parallel_size: int = 1,
        triton_batch_dim: bool = False,
        force: bool = False,
    ) -> None:
        self._destination = destination.absolute()
        self._model = model
        self._session_len = session_len
        self._source_config = source_config
        self._tp = tensor_parallel_size
        self._triton_batch_dim = triton_batch_dim
        check_destination(self._destination, force)
        groups = {"common": common_tensor_specs(model)}
        for rank in range(tensor_parallel_size):
            groups[f"rank{rank}"] = tensor_specs(model, tensor_parallel_size, rank)
        self._plan: dict[str, list[TensorSpec]] = {}
        for prefix, specs in groups.items():
            self._plan |= plan_shards(prefix, specs.values())
        self.num_bytes = sum(spec.num_bytes for specs in self._plan.values() for spec in specs)
        self._stack = ExitStack()
        self._shards: dict[str, ShardWriter] = {}
        self._files = {spec.name: file for file, specs in self._plan.items() for spec in specs}

    def __enter__(self) -> WorkspaceWriter:
        parent = self._destination.parent
        parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._stack.enter_context(partial_directory(parent, self._destination.name))
        self._weights_dir = self._temporary / MODEL_DIR / VERSION / "weights"
        self.tokenizer_dir = self._temporary / MODEL_DIR / VERSION / "tokenizer"
        try:
            free = shutil.disk_usage(parent).free
            if free < self.num_bytes:
                raise WorkspaceError(
                    f"{parent} has {free / 1e9:.1f} GB free, the workspace needs {self.num_bytes / 1e9:.1f} GB: "
                    "free some space or choose another --dst-path"
                )
            self._weights_dir.mkdir(parents=True)
            self.tokenizer_dir.mkdir()
            for file, specs in self._plan.items():
                self._shards[file] = self._stack.enter_context(ShardWriter(self._weights_dir / file, specs))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, name: str, *blocks: torch.Tensor) -> int:
        """Write tensor `name`, given as blocks of its rows on the CPU, in its stored dtype. Returns its bytes.

        The blocks are not kept: they may be overwritten afterwards.
        """
        return self._shards[self._files[name]].write(name, blocks)

    def commit(self, *, durable: bool = True) -> None:
        """Write everything but the weights, flush it all to the disk and move the workspace into place.

        durable: False leaves the flushing out, for a workspace that need not outlive the machine.
        """
        index = WeightIndex(
            format_version=FORMAT_VERSION,
            version=__version__,
            image=DOCKER_IMAGE,
            tensor_parallel_size=self._tp,
            chunk_bytes=CHUNK_BYTES,
            tensors=self._files,
            files={file: shard.finish() for file, shard in self._shards.items()},
        )
        index.write(self._weights_dir / INDEX_NAME)
        _write_json(self._weights_dir / MODEL_JSON, to_dict(self._model))
        _write_json(self._weights_dir / "config.json", self._source_config)
        template = resource(str(MODEL_DIR / VERSION / "weights" / CONFIG_INI)).read_text(encoding="utf-8")
        (self._weights_dir / CONFIG_INI).write_text(
            render_config_ini(template, self._model, session_len=self._session_len, tensor_parallel_size=self._tp),
            encoding="utf-8",
        )
        pbtxt = resource(str(MODEL_DIR / "config.pbtxt")).read_text(encoding="utf-8")
        (self._temporary / MODEL_DIR / "config.pbtxt").write_text(
            _with_batch_dim(pbtxt) if self._triton_batch_dim else pbtxt, encoding="utf-8"
        )
        shutil.copy(resource(SERVICE_SCRIPT), self._temporary / SERVICE_SCRIPT)
        (self._temporary / "triton_models").symlink_to(MODEL_DIR / VERSION, target_is_directory=True)
        if durable:
            _sync_tree(self._temporary)
        _move_into_place(self._temporary, self._destination)


def write_kv_scales(workspace: Workspace, scales: list[list[torch.Tensor]]) -> None:
    """Put the scales of a calibrated int8 KV cache into a workspace that is there, in place of earlier ones.

    scales: by rank and layer, [k_scale, k_zero, v_scale, v_zero] fp32. Stopped at any point, this leaves a workspace
    that can be opened, with new scales, with the earlier ones or with none.
    """
    index, where = workspace.index, workspace.weights_dir / INDEX_NAME
    kept = {name: file for name, file in index.tensors.items() if file != KV_SCALES_FILE}
    if kept != index.tensors:
        # The index names the file by its checksum: first it must not name it any more.
        without = {name: entry for name, entry in index.files.items() if name != KV_SCALES_FILE}
        index = msgspec.structs.replace(index, tensors=kept, files=without)
        _replace_file(where, index.write)
    by_rank = kv_scale_specs(workspace.model, index.tensor_parallel_size)
    specs = [spec for rank in by_rank for spec in rank]
    entries = []

    def write(path: Path) -> None:
        with ShardWriter(path, specs) as writer:
            for spec, values in zip(specs, (values for rank in scales for values in rank), strict=True):
                writer.write(spec.name, [values])
            entries.append(writer.finish())

    _replace_file(workspace.weights_dir / KV_SCALES_FILE, write)
    tensors = index.tensors | {spec.name: KV_SCALES_FILE for spec in specs}
    index = msgspec.structs.replace(index, tensors=tensors, files=index.files | {KV_SCALES_FILE: entries[0]})
    _replace_file(where, index.write)


def _replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside `path`, flushed to the disk, then put it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_batch_dim(pbtxt: str) -> str:
    assert pbtxt.count("max_batch_size: 0") == 1
    return pbtxt.replace("max_batch_size: 0", "max_batch_size: 1")


def check_destination(destination: Path, force: bool) -> None:
    """Raise WorkspaceError when a workspace must not be written to `destination`."""
    if destination.is_symlink():
        raise WorkspaceError(f"{destination} is a symbolic link: give the directory itself as --dst-path")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not is_workspace(destination):
        raise WorkspaceError(
            f"{destination} exists and is no workspace: choose another --dst-path or remove it yourself"
        )
    if not force:
        raise WorkspaceError(f"{destination} is a workspace already: --force replaces it")


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for path in (*(Path(directory, file) for file in files), Path(directory)):
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, destination: Path) -> None:
    if not is_workspace(destination):
        temporary.rename(destination)
        return
    replaced = temporary.with_suffix(".replaced")
    destination.rename(replaced)
    try:
        temporary.rename(destination)
    except OSError:
        replaced.rename(destination)
        raise
    shutil.rmtree(replaced)
