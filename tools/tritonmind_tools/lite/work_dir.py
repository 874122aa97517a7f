"""The files of a calibration in a work_dir: written as a whole or not at all, and its state while it runs.

work_dir/calibration/            manifest.json, tokens, inputs_stats, key_stats and value_stats.safetensors
work_dir/.calibration.partial/   while `calibrate` runs, and after it was killed: what it needs to go on
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from tritonmind import __version__
from tritonmind.config import ModelConfig
from tritonmind.errors import ConfigError
from tritonmind.tensor_layout import STORED_DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
CALIBRATION = "calibration"
MANIFEST = "manifest.json"
TOKENS = "tokens"
INPUTS, KEYS, VALUES = STATISTICS = ("inputs_stats", "key_stats", "value_stats")

_PARTIAL, _NEW, _REPLACED = ".calibration.partial", ".calibration.new", ".calibration.replaced"
_HIDDEN = "hidden"
CALIBRATE_AGAIN = "run `tritonmind lite calibrate` again"

_Count = Annotated[int, msgspec.Meta(ge=1)]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was calibrated, on what. Equal manifests mean equal statistics, on one machine.

    fingerprint: LayerSource.fingerprint. norm_sha256: of the last norm's weight in each type that a workspace may hold
    it in, by which a workspace of this model is known again. tokens_sha256: of the samples' token ids.
    """

    format_version: int = FORMAT_VERSION
    version: str = __version__
    fingerprint: str
    norm_sha256: dict[str, str]
    model: ModelConfig
    dataset: str
    samples: _Count
    seqlen: _Count
    seed: int
    tokens_sha256: str
    device: str


class Calibration:
    """A finished calibration, opened for reading. Raises ConfigError naming what is missing or damaged."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self._directory = work_dir / CALIBRATION
        path = self._directory / MANIFEST
        if not path.is_file():
            hint = "it was interrupted; " if (work_dir / _PARTIAL).is_dir() else ""
            raise ConfigError(
                f"--work_dir={work_dir} holds no finished calibration: {hint}"
                f"run `tritonmind lite calibrate --work_dir {work_dir}` first"
            )
        self.manifest = _read_manifest(path)

    def tokens(self) -> torch.Tensor:
        """The samples' token ids, [samples, seqlen] int32."""
        return self._read(TOKENS)[TOKENS]

    def statistics(self, kind: str) -> dict[str, torch.Tensor]:
        """One file of STATISTICS: tensors by statistic_name."""
        return self._read(kind)

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._directory / f"{name}.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): {CALIBRATE_AGAIN}") from None


class CalibrationState:
    """A calibration that runs. Opened with the manifest of an interrupted one it goes on there, else it begins anew.

    num_done: layers whose statistics are on the disk together with the hidden states after them.
    """

    def __init__(self, work_dir: Path, manifest: Manifest, tokens: torch.Tensor) -> None:
        work_dir.mkdir(parents=True, exist_ok=True)
        self._work_dir, self._manifest = work_dir, manifest
        self._directory = work_dir / _PARTIAL
        self.num_done = 0
        if not self._matches():
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir()
            save_tensors(self._directory / f"{TOKENS}.safetensors", {TOKENS: tokens})
            _write_json(self._directory / MANIFEST, manifest)
        elif self._layer_path(manifest.model.num_layers - 1).is_file():
            self.num_done = manifest.model.num_layers  # only to be put into place
        elif hidden := sorted(self._directory.glob(f"{_HIDDEN}-*.safetensors")):
            self.num_done = int(hidden[-1].stem.removeprefix(f"{_HIDDEN}-"))

    def hidden(self) -> torch.Tensor:
        """The hidden states after layer num_done - 1: [samples, seqlen, hidden_size] fp32."""
        from safetensors.torch import load_file

        # Copied: what is loaded is a view of the file, and hidden states are overwritten by the next layer's.
        return load_file(self._hidden_path(self.num_done))[_HIDDEN].clone()

    def save_layer(self, number: int, statistics: Mapping[str, torch.Tensor]) -> None:
        """Keep the statistics of a layer."""
        save_tensors(self._layer_path(number), statistics)

    def save_hidden(self, num_done: int, hidden: torch.Tensor) -> None:
        """Keep the hidden states after so many layers, whose statistics are kept already: here it can go on."""
        from tritonmind.weight_files import ShardWriter

        def write(path: Path) -> None:
            with ShardWriter(path, [TensorSpec(_HIDDEN, tuple(hidden.shape), "F32")]) as writer:
                writer.write(_HIDDEN, [hidden])
                writer.finish()

        _atomically(self._hidden_path(num_done), write)
        if self.num_done:
            self._hidden_path(self.num_done).unlink()
        self.num_done = num_done

    def finish(self) -> None:
        """Put the statistics of all layers into place, in exchange for those of an earlier calibration."""
        from safetensors.torch import load_file

        from tritonmind_tools.lite.decoder_layer import KEY, VALUE

        by_file: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in STATISTICS}
        for number in range(self._manifest.model.num_layers):
            for name, tensor in load_file(self._layer_path(number)).items():
                what = name.split(".", 2)[2].rpartition(".")[0]
                by_file[{KEY: KEYS, VALUE: VALUES}.get(what, INPUTS)][name] = tensor
        new, replaced, final = (self._work_dir / name for name in (_NEW, _REPLACED, CALIBRATION))
        for leftover in (new, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        try:
            for kind, tensors in by_file.items():
                save_tensors(new / f"{kind}.safetensors", tensors)
            for name in (f"{TOKENS}.safetensors", MANIFEST):
                _atomically(new / name, functools.partial(shutil.copyfile, self._directory / name))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if final.exists():
            final.rename(replaced)
        new.rename(final)
        for leftover in (self._directory, replaced):
            shutil.rmtree(leftover, ignore_errors=True)

    def _matches(self) -> bool:
        path = self._directory / MANIFEST
        try:
            return path.is_file() and _read_manifest(path) == self._manifest
        except ConfigError:
            return False

    def _layer_path(self, number: int) -> Path:
        return self._directory / f"layer-{number:05d}.safetensors"

    def _hidden_path(self, num_done: int) -> Path:
        return self._directory / f"{_HIDDEN}-{num_done:05d}.safetensors"


def norm_hashes(norm: torch.Tensor) -> dict[str, str]:
    """SHA-256 of the weight of a model's last norm in every type that a workspace may store it in."""
    return {dtype: norm_hash(norm, dtype) for dtype in STORED_DTYPES.values()}


def norm_hash(norm: torch.Tensor, dtype: str) -> str:
    """dtype: a safetensors name, as in tensor_layout."""
    from tritonmind.weight_files import torch_dtype

    return hash_tensor(norm.to(torch_dtype(dtype)))


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    import torch

    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, of tensors that are small, which is there as a whole or not at all."""
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    _atomically(path, lambda temporary: _write_bytes(temporary, data))


def _write_json(path: Path, manifest: Manifest) -> None:
    _atomically(
        path, lambda temporary: _write_bytes(temporary, msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    )


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # of a write to a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _read_manifest(path: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): {CALIBRATE_AGAIN}") from None
    if manifest.format_version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format_version is {manifest.format_version}, this version reads {FORMAT_VERSION}: "
            f"{CALIBRATE_AGAIN}"
        )
    return manifest
