"""The workspace that the server serves: its paths and its reader. `workspace_writer` is the other half.

Opening checks everything that costs no reading of weights; `tensors` checks the rest. The server loads its adapter
twice, so torch is imported only where tensors are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.chunk_checks import ChunkChecks, few_copy_threads
from tritonmind.config import EngineConfig, ModelConfig, from_dict
from tritonmind.config_ini import build_engine_config, read_config_ini
from tritonmind.errors import ConfigError, WorkspaceError
from tritonmind.tensor_layout import (
    KV_SCALES_FILE,
    TensorSpec,
    check_tensor_parallel,
    common_tensor_specs,
    kv_scale_specs,
    tensor_specs,
)
from tritonmind.weight_files import (
    CONVERT_AGAIN,
    INDEX_NAME,
    WeightIndex,
    check_chunk,
    num_chunks,
    read_tensor,
    read_tensors,
)

if TYPE_CHECKING:
    import torch

MODEL_DIR = Path("model_repository/tritonmind")
VERSION = "1"
CONFIG_INI = "config.ini"
MODEL_JSON = "model.json"

_SCALES_AGAIN = "run `tritonmind lite kv_qparams` again"


class Workspace:
    """A workspace on disk, opened for reading.

    version_dir: model_repository/tritonmind/1 in the directory of `convert --dst-path`. model: facts of the model, with
    the rotary scaling that config.ini asks for.
    """

    warnings: tuple[str, ...] = ()

    def __init__(self, version_dir: Path) -> None:
        self.version_dir = version_dir
        self.weights_dir = version_dir / "weights"
        self.tokenizer_dir = version_dir / "tokenizer"
        self.config_ini = self.weights_dir / CONFIG_INI
        model_json = self.weights_dir / MODEL_JSON
        stored = _read_model(model_json)
        self.model, self._settings = read_config_ini(self.config_ini, stored, model_json)
        self.index = WeightIndex.read(self.weights_dir / INDEX_NAME)
        self._check_index()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Workspace:
        """Open the workspace at `path`: its root, model_repository/tritonmind, or that directory's version directory.

        Raises WorkspaceError when it is missing, damaged or incomplete, ConfigError when config.ini is wrong.
        """
        given = Path(path)
        if not given.is_dir():
            raise WorkspaceError(f"workspace {given} is not a directory")
        for candidate in (given / MODEL_DIR / VERSION, given / VERSION, given):
            if (candidate / "weights" / INDEX_NAME).is_file():
                return cls(candidate.resolve())
        if (given / "config.json").is_file():
            raise WorkspaceError(
                f"{given} is a checkpoint, no workspace: run `tritonmind convert MODEL_NAME {given}` first"
            )
        raise WorkspaceError(
            f"{given} is no workspace: it has no {MODEL_DIR / VERSION / 'weights' / INDEX_NAME}; "
            "nor is it a checkpoint: it has no config.json"
        )

    def engine_config(self, **overrides: Any) -> EngineConfig:
        """The engine's configuration from config.ini and `overrides`, which win.

        Overrides are flat names: fields of EngineConfig, CacheConfig and SchedulerConfig (device, dtype, max_num_seqs,
        ...) or config.ini's (session_len, ...). Raises ConfigError for an unknown one or a wrong value.
        """
        return build_engine_config(self.model, self._settings, overrides, where=self.config_ini)

    def tensors(self, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, CPU tensor) for the common tensors and those of `rank`, as tensor_layout lists them.

        The checksums of what holds a tensor are verified, by threads that run ahead, before it is yielded. The tensors
        may be views of the mapped file, one file at a time: read them, do not write. Raises WorkspaceError naming file
        and tensor.
        """
        by_file: dict[Path, list[TensorSpec]] = {}
        for name, spec in self._specs([rank]).items():
            by_file.setdefault(self.weights_dir / self.index.tensors[name], []).append(spec)
        entries = {path: self.index.files[path.name] for path in by_file}
        with ChunkChecks(entries, self.index.chunk_bytes) as checks, few_copy_threads():
            for path, specs in by_file.items():
                ends = checks.data_ends(path)
                for name, tensor in read_tensors(path, specs):
                    checks.wait(path, ends[name])
                    yield name, tensor

    def kv_scales(self, rank: int) -> torch.Tensor | None:
        """Scales of a calibrated int8 KV cache, [num_layers, 4] fp32: k_scale, k_zero, v_scale, v_zero of each layer.

        None where `tritonmind lite kv_qparams` has not written them. Raises WorkspaceError for a file that was altered.
        """
        import torch

        entry, path = self.index.files.get(KV_SCALES_FILE), self.weights_dir / KV_SCALES_FILE
        if entry is None:
            return None
        for number in range(len(entry.sha256)):
            check_chunk(path, entry, self.index.chunk_bytes, number, remedy=_SCALES_AGAIN)
        specs = kv_scale_specs(self.model, self.index.tensor_parallel_size)[rank]
        return torch.stack([read_tensor(path, spec) for spec in specs])

    def _specs(self, ranks: Iterable[int]) -> dict[str, TensorSpec]:
        specs = common_tensor_specs(self.model)
        for rank in ranks:
            specs |= tensor_specs(self.model, self.index.tensor_parallel_size, rank)
        return specs

    def _check_index(self) -> None:
        index, where = self.index, self.weights_dir / INDEX_NAME
        tp = self._settings["tensor_parallel_size"]
        if tp != index.tensor_parallel_size:
            raise ConfigError(
                f"{self.config_ini}: tensor_para_size = {tp}, but {where} says {index.tensor_parallel_size}: "
                f"restore it, or run `tritonmind convert --tp {tp}`"
            )
        check_tensor_parallel(self.model, tp)
        expected = self._specs(range(tp))
        if KV_SCALES_FILE in index.files:
            expected |= {spec.name: spec for specs in kv_scale_specs(self.model, tp) for spec in specs}
        for name in expected.keys() - index.tensors.keys():
            raise WorkspaceError(f"{where}: tensor {name} is missing: {_remedy(name)}")
        for name in index.tensors.keys() - expected.keys():
            raise WorkspaceError(f"{where}: tensor {name} is not one of this model: {_remedy(name)}")
        for file in sorted({*index.files, *index.tensors.values()}):
            self._check_file(file)

    def _check_file(self, file: str) -> None:
        where, entry, remedy = self.weights_dir / INDEX_NAME, self.index.files.get(file), _remedy(file)
        if entry is None or Path(file).name != file:
            raise WorkspaceError(f"{where}: {file} has no entry under files: {remedy}")
        if len(entry.sha256) != num_chunks(entry.size, self.index.chunk_bytes):
            raise WorkspaceError(f"{where}: {file} has {len(entry.sha256)} checksums for {entry.size} bytes: {remedy}")
        try:
            size = (self.weights_dir / file).stat().st_size
        except OSError as error:
            raise WorkspaceError(f"{self.weights_dir / file} cannot be read ({error.strerror}): {remedy}") from None
        if size != entry.size:
            raise WorkspaceError(
                f"{self.weights_dir / file} has {size} bytes, {INDEX_NAME} says {entry.size}: "
                f"it was truncated or replaced; {remedy}"
            )


def _remedy(what: str) -> str:
    """For a tensor or a file of this name."""
    return _SCALES_AGAIN if what == KV_SCALES_FILE or ".past_kv_scale." in what else CONVERT_AGAIN


def is_workspace(path: Path) -> bool:
    """Whether `path` is a workspace's root. The template in a checkout is none: it has no index."""
    return (path / MODEL_DIR / VERSION / "weights" / INDEX_NAME).is_file()


def _read_model(path: Path) -> ModelConfig:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WorkspaceError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise WorkspaceError(f"{path} holds no JSON object: {CONVERT_AGAIN}")
    model = from_dict(ModelConfig, data, where=str(path))
    if not model.eos_token_ids:
        raise WorkspaceError(f"{path}: eos_token_ids is empty: an answer could not end")
    return model
