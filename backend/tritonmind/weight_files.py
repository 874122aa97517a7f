"""The files under `weights/`: safetensors shards written as a stream, and the index with their sizes and checksums.

A shard's header is known before its first tensor, so a writer holds no more than the rows that it is converting.
SHA-256 is taken per chunk of a file, so that threads can check one file together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from tritonmind.errors import CheckpointError, WorkspaceError
from tritonmind.tensor_layout import TensorSpec

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
CHUNK_BYTES = 64 << 20
MAX_SHARD_BYTES = 4 << 30
INDEX_NAME = "index.json"
CONVERT_AGAIN = "run `tritonmind convert` again"
FP16_REMEDY = "convert with --weight-type bf16 or --weight-type fp32, or serve the checkpoint with dtype bf16 or fp32"

# Rows are converted in pieces of about this size: large enough for speed, small beside any tensor worth a limit.
_PIECE_BYTES = 64 << 20
# Tensor data begins on a cache line when the file is mapped.
_ALIGNMENT = 64


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A weight file: its size in bytes and the hexadecimal SHA-256 of each chunk of `chunk_bytes`, the last shorter."""

    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: list[str]


class WeightIndex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`weights/index.json`. `image` and `version` tell service_docker_up.sh what to run the workspace with."""

    format_version: int
    version: str
    image: str
    tensor_parallel_size: int
    chunk_bytes: Annotated[int, msgspec.Meta(ge=1)]
    tensors: dict[str, str]
    files: dict[str, FileEntry]

    @classmethod
    def read(cls, path: Path) -> WeightIndex:
        """Raises WorkspaceError when the file is missing, damaged or of another format version."""
        try:
            data = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise WorkspaceError(f"{path} cannot be read: {error}") from None
        found = data.get("format_version") if isinstance(data, dict) else None
        if found != FORMAT_VERSION:
            raise WorkspaceError(
                f"{path}: format_version is {found!r}, but this version reads {FORMAT_VERSION}: {CONVERT_AGAIN}"
            )
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise WorkspaceError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name: F16, BF16, F32 or I32."""
    import torch

    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}[name]


def plan_shards(
    prefix: str, specs: Iterable[TensorSpec], max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[TensorSpec]]:
    """Cut `specs`, in order, into files of at most `max_bytes` (one larger tensor gets a file of its own)."""
    shards: dict[str, list[TensorSpec]] = {}
    current: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if not current or size + spec.num_bytes > max_bytes:
            current, size = [], 0
            shards[f"{prefix}-{len(shards):05d}.safetensors"] = current
        current.append(spec)
        size += spec.num_bytes
    return shards


class ShardWriter:
    """Writes one safetensors file whose tensors come in the order of `specs`. A context manager.

    fp16_remedy: what to do about a value that fp16 cannot hold.
    """

    def __init__(self, path: Path, specs: list[TensorSpec], fp16_remedy: str = FP16_REMEDY) -> None:
        self._fp16_remedy = fp16_remedy
        self._specs: Iterator[TensorSpec] = iter(specs)
        self._file = path.open("wb")
        # One thread, so that parts are hashed in order; hashing and writing take about the same time.
        self._hasher = ThreadPoolExecutor(1, "hash")
        self._chunk = hashlib.sha256()
        self._size = 0
        self._sha256: list[str] = []
        self._append(_header(specs))

    def write(self, name: str, blocks: Iterable[torch.Tensor]) -> int:
        """Append the next tensor, given as blocks of rows, converted to its stored dtype. Returns its bytes.

        The blocks, on the CPU, are not kept: they may be overwritten afterwards. Raises CheckpointError when a finite
        value does not fit the stored dtype.
        """
        spec = next(self._specs)
        assert spec.name == name, f"{name} comes where {spec.name} was planned"
        before = self._size
        for block in blocks:
            rows = max(1, _PIECE_BYTES * block.shape[0] // max(1, block.nbytes))
            for piece in block.split(rows):
                self._append(_stored_bytes(spec, piece, self._fp16_remedy))
        assert self._size - before == spec.num_bytes, f"{name}: {self._size - before} bytes, planned {spec.num_bytes}"
        return spec.num_bytes

    def finish(self) -> FileEntry:
        """Close the file and return its index entry. All planned tensors must have come."""
        assert next(self._specs, None) is None, "a planned tensor did not come"
        self._close()
        if self._size % CHUNK_BYTES:
            self._sha256.append(self._chunk.hexdigest())
        return FileEntry(self._size, self._sha256)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._hasher.shutdown()
        self._file.close()

    def _append(self, data: bytes | memoryview) -> None:
        hashing = self._hasher.submit(self._hash, memoryview(data))
        self._file.write(data)
        hashing.result()

    def _hash(self, view: memoryview) -> None:
        while view:
            part = view[: CHUNK_BYTES - self._size % CHUNK_BYTES]
            self._chunk.update(part)
            self._size += len(part)
            view = view[len(part) :]
            if self._size % CHUNK_BYTES == 0:
                self._sha256.append(self._chunk.hexdigest())
                self._chunk = hashlib.sha256()


def num_chunks(size: int, chunk_bytes: int) -> int:
    return -(-size // chunk_bytes)


def check_chunk(path: Path, entry: FileEntry, chunk_bytes: int, number: int, *, remedy: str = CONVERT_AGAIN) -> None:
    """Raise WorkspaceError unless chunk `number` of the file is what the index says."""
    with path.open("rb", buffering=0) as file:
        file.seek(number * chunk_bytes)
        digest = hashlib.sha256()
        left = min(chunk_bytes, entry.size - number * chunk_bytes)
        buffer = memoryview(bytearray(min(left, 1 << 20)))
        while left > 0 and (count := file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:count])
            left -= count
    if left or digest.hexdigest() != entry.sha256[number]:
        raise WorkspaceError(
            f"{path} was altered or damaged after it was written, at or after byte {number * chunk_bytes}: {remedy}"
        )


def read_tensors(path: Path, specs: Iterable[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield exactly `specs` from a safetensors file. Raises WorkspaceError naming file and tensor when they differ."""
    from safetensors import SafetensorError, safe_open

    expected = {spec.name: spec for spec in specs}
    try:
        with safe_open(path, framework="pt") as file:
            for name in expected.keys() - set(file.keys()):
                raise WorkspaceError(f"{path}: tensor {name} is missing: {CONVERT_AGAIN}")
            for name in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                if name not in expected:
                    raise WorkspaceError(
                        f"{path}: tensor {name} is not one of this model: convert the checkpoint again"
                    )
            for name, spec in expected.items():
                yield name, _checked_tensor(file, path, spec)
    except (SafetensorError, OSError) as error:
        raise WorkspaceError(f"{path} cannot be read: {error}") from None


def read_tensor(path: Path, spec: TensorSpec) -> torch.Tensor:
    """One tensor of a safetensors file, which may hold others. Raises WorkspaceError as read_tensors does."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return _checked_tensor(file, path, spec)
    except (SafetensorError, OSError) as error:
        raise WorkspaceError(f"{path} cannot be read: {error}") from None


def _checked_tensor(file: Any, path: Path, spec: TensorSpec) -> torch.Tensor:
    found = file.get_slice(spec.name)
    shape, dtype = tuple(found.get_shape()), found.get_dtype()
    if (shape, dtype) != (spec.shape, spec.dtype):
        raise WorkspaceError(
            f"{path}: tensor {spec.name} is {dtype}{list(shape)}, "
            f"the model needs {spec.dtype}{list(spec.shape)}: {CONVERT_AGAIN}"
        )
    tensor: torch.Tensor = file.get_tensor(spec.name)
    return tensor


def _header(specs: list[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def to_stored(spec: TensorSpec, block: torch.Tensor, remedy: str = FP16_REMEDY) -> torch.Tensor:
    """`block` of rows in the stored dtype. Raises CheckpointError, with the remedy, when a value does not fit fp16.

    Also for a scale of 4-bit weights that is not finite to begin with; of other tensors that would take long to see.
    """
    import torch

    dtype = torch_dtype(spec.dtype)
    assert block.is_floating_point() == dtype.is_floating_point, f"{spec.name} came as {block.dtype}"
    stored = block.to(dtype)
    are_scales = spec.name.endswith(".scales")
    if dtype == torch.float16 and (block.dtype != dtype or are_scales) and not torch.isfinite(stored).all():
        if are_scales:
            raise CheckpointError(
                f"{spec.name} holds scales that are not finite in fp16, which 4-bit weights have them in"
            )
        raise CheckpointError(f"{spec.name} holds values that fp16 cannot: {remedy}")
    return stored


def _stored_bytes(spec: TensorSpec, piece: torch.Tensor, remedy: str) -> memoryview:
    import torch

    return to_stored(spec, piece, remedy).contiguous().flatten().view(torch.uint8).numpy().data
