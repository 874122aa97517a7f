"""`tritonmind bench load`: how fast weights come from the disk to the device, beside `cat` of the same files.

cold: the files were put out of the page cache before; cached: they are in it. A workspace's checksums are verified on
the way. host memory is the most that the process held beside mapped files, and on a CPU beside the weights themselves.
With --convert a checkpoint is also converted, beside what `cp` and `sync` take for the same files.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.memory import MIB, MemoryWatch
from tritonmind_tools.bench.report import Report, add_output_options, precision, print_table
from tritonmind_tools.bench.shapes import shape_name

if TYPE_CHECKING:
    from tritonmind.model_source import ModelSource

WEIGHT_PATTERNS = ("*.safetensors", "*.gguf")
COLD, CACHED = "cold", "cached"
# The program that reads or writes the same files.
_BESIDE = {"load": "cat", "convert": "cp + sync"}


@dataclass(frozen=True)
class Row:
    """One way through the files. num_bytes: theirs. host_memory: bytes, None where it was not looked at."""

    what: str
    cache: str
    num_bytes: int
    seconds: float
    host_memory: int | None = None

    @property
    def rate(self) -> float:
        """GB/s of 10^9 bytes."""
        return self.num_bytes / self.seconds / 1e9


def register(kinds: Any) -> None:
    """Add `bench load`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "load", help="weights from the disk to the device, beside `cat`", description=__doc__
    )
    parser.add_argument("path", metavar="PATH", help="workspace or checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="type to compute in (default: %(default)s)")
    parser.add_argument("--cached-only", action="store_true", help="leave the readings of a cold disk out")
    parser.add_argument("--convert", action="store_true", help="also convert the checkpoint, into a folder beside it")
    add_output_options(parser, plots=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write files. Raises ConfigError for a path without weight files."""
    from tritonmind.model_source import open_model

    source = open_model(args.path, dtype=args.dtype)
    files = weight_files(source, Path(args.path))
    report = Report.from_args(args)
    rows = []
    for cache in (CACHED,) if args.cached_only else (COLD, CACHED):
        settle(files, cache)
        rows.append(_timed("cat", cache, files, lambda: cat(files)))
        settle(files, cache)
        load, memory = Loader(source, args.device, args.dtype), MemoryWatch(lambda: -anonymous_bytes())
        with memory:
            row = _timed("load", cache, files, load)
        rows.append(Row(**{**asdict(row), "host_memory": max(0, memory.peak - load.kept_bytes)}))
        load.release()
    if args.convert:
        rows += conversion(Path(args.path), files)
    report.print_facts()
    print_rows(rows)
    kind = {"shape": shape_name(source.model), "precision": precision(source.model, load.dtype)}
    report.write([as_entry(row, kind) for row in rows])
    return 0


def as_entry(row: Row, kind: Mapping[str, str]) -> dict[str, Any]:
    """What files hold of a row. kind: its shape and precision."""
    return {
        "workload": f"{row.what} {row.cache}",
        **kind,
        "value": row.rate,
        "unit": "GB/s",
        "roofline_fraction": None,
        **asdict(row),
    }


def weight_files(source: ModelSource, path: Path) -> list[Path]:
    """The files that hold the model's weights, in the order of their names."""
    folder: Path = getattr(source, "weights_dir", getattr(source, "path", path))
    files = [folder] if folder.is_file() else sorted(file for p in WEIGHT_PATTERNS for file in folder.glob(p))
    if not files:
        raise ConfigError(f"{folder} has none of {', '.join(WEIGHT_PATTERNS)} to read")
    return files


def settle(files: Sequence[Path], cache: str) -> None:
    """Put the files into the page cache, or out of it."""
    if cache == CACHED:
        cat(files)
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not written yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cat(files: Sequence[Path]) -> None:
    """Read the files one after another, by the program of that name."""
    with Path(os.devnull).open("wb") as nowhere:
        subprocess.run(["cat", "--", *map(str, files)], stdout=nowhere, check=True)


class Loader:
    """Reads a model as an engine does. Call it once; kept_bytes is then what the weights take of the host's memory."""

    def __init__(self, source: ModelSource, device: str, dtype: str) -> None:
        from tritonmind.engine.device import resolve_device, resolve_dtype

        self._source = source
        self._config = source.engine_config(device=device, dtype=dtype)
        self._device = resolve_device(self._config.device)
        self._dtype = resolve_dtype(self._config, self._device)
        self._model: Any = None
        self.dtype = str(self._dtype).removeprefix("torch.")  # that it computes in
        self.kept_bytes = 0

    def __call__(self) -> None:
        import torch

        from tritonmind.models.weight_loader import load_model

        self._model = load_model(
            self._source.model,
            self._source.tensors(rank=0),
            max_model_len=self._config.scheduler.max_model_len,
            dtype=self._dtype,
            device=self._device,
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        else:
            self.kept_bytes = sum(tensor.nbytes for tensor in self._model.state_dict().values())

    def release(self) -> None:
        """Give the memory back."""
        import torch

        self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def anonymous_bytes() -> int:
    """Memory of this process that is not of mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("/proc/self/status has no RssAnon")


def conversion(path: Path, files: Sequence[Path]) -> list[Row]:
    """`convert` of a checkpoint, flushed to the disk, and `cp` with `sync` of the same files, each from a cold disk."""
    from tritonmind_tools.convert import convert

    rows = []
    with tempfile.TemporaryDirectory(prefix=".bench-load-", dir=path.absolute().parent) as folder:
        copies, workspace = Path(folder, "copies"), Path(folder, "workspace")
        copies.mkdir()

        def copy() -> None:
            subprocess.run(["cp", "--", *map(str, files), str(copies)], check=True)
            subprocess.run(["sync", "--", *(str(copies / file.name) for file in files)], check=True)

        settle(files, COLD)
        rows.append(_timed("cp + sync", COLD, files, copy))
        shutil.rmtree(copies)
        settle(files, COLD)
        with MemoryWatch(lambda: -anonymous_bytes()) as memory:
            row = _timed("convert", COLD, files, lambda: convert("bench", path, workspace))
        rows.append(Row(**{**asdict(row), "host_memory": memory.peak}))
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    """Each rate beside that of the plain program before it."""
    lines = []
    for row in rows:
        plain = next((r for r in rows if r.cache == row.cache and r.what == _BESIDE.get(row.what)), None)
        lines.append(
            (
                row.what,
                row.cache,
                f"{row.num_bytes / 1e9:.2f}",
                f"{row.seconds:.2f}",
                f"{row.rate:.2f}",
                "" if plain is None else f"{100 * row.rate / plain.rate:.0f} %",
                "" if row.host_memory is None else f"{row.host_memory / MIB:.0f}",
            )
        )
    print_table(("what", "files", "GB", "s", "GB/s", "of the program", "host memory, MiB"), lines)


def _timed(what: str, cache: str, files: Sequence[Path], read: Callable[[], object]) -> Row:
    begin = time.perf_counter()
    read()
    seconds = time.perf_counter() - begin
    return Row(what, cache, sum(file.stat().st_size for file in files), seconds)
