"""Weights reach the device bit for bit, whatever their sizes, types and strides, and the host holds the ring alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritonmind.models.weight_stream import WeightStream, pieces

SHAPES = [(), (1,), (0, 4), (7,), (1000, 3), (3, 1001), (1, 5000), (129, 64, 2)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BUFFER_BYTES = 1024  # most of these shapes need several


def strided(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random values with gaps between them along every dimension."""
    return torch.randn([2 * extent for extent in shape]).to(dtype)[tuple(slice(None, None, 2) for _ in shape)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source_strided", [False, True])
@pytest.mark.parametrize("target_strided", [False, True])
def test_pieces_cover_a_tensor_once(shape: tuple[int, ...], source_strided: bool, target_strided: bool) -> None:
    source = strided(shape, torch.float32)
    source = source if source_strided else source.contiguous()
    target = torch.zeros_like(strided(shape, torch.float64))
    target = target if target_strided else target.contiguous()
    for target_piece, source_piece in pieces(target, source, BUFFER_BYTES):
        assert source_piece.nbytes <= BUFFER_BYTES
        target_piece += source_piece  # a place that comes twice would hold twice its value
    assert torch.equal(target, source.double())


def test_contiguous_tensors_are_cut_into_full_buffers() -> None:
    source = torch.randn(3, 1001)
    sizes = [piece.nbytes for _, piece in pieces(torch.empty_like(source), source, BUFFER_BYTES)]
    assert sizes == [BUFFER_BYTES] * 11 + [source.nbytes - 11 * BUFFER_BYTES]


def test_a_copy_on_the_cpu_is_plain() -> None:
    sources = [strided(shape, torch.bfloat16) for shape in SHAPES]
    targets = [torch.empty(shape, dtype=torch.float32) for shape in SHAPES]
    with WeightStream(torch.device("cpu")) as stream:
        for target, source in zip(targets, sources, strict=True):
            stream.copy(target, source)
    assert stream.num_bytes == sum(source.nbytes for source in sources) > 0
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.float())


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_bytes", [BUFFER_BYTES, 64 << 20])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("served", DTYPES)
def test_every_bit_reaches_the_card(buffer_bytes: int, stored: torch.dtype, served: torch.dtype) -> None:
    sources = [strided(shape, stored) for shape in SHAPES]
    sources += [source.contiguous() for source in sources]
    sources.append(torch.randn(20_000_003).to(stored) if buffer_bytes > BUFFER_BYTES else torch.randn(9999).to(stored))
    targets = [torch.full(source.shape, float("nan"), dtype=served, device="cuda") for source in sources]
    # The second half of a fused weight, and a target with gaps.
    fused = torch.zeros(258, 64, 2, dtype=served, device="cuda")
    gaps = torch.zeros(129, 128, 2, dtype=served, device="cuda")[:, ::2]
    for target in (fused[129:], gaps):
        sources.append(torch.randn(129, 64, 2).to(stored))
        targets.append(target)
    with WeightStream(torch.device("cuda"), buffer_bytes=buffer_bytes) as stream:
        for target, source in zip(targets, sources, strict=True):
            stream.copy(target, source)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.cpu(), source.to(served))
    assert not fused[:129].any()


@pytest.mark.gpu
def test_copies_that_lag_behind() -> None:
    """The card is busy while the host goes around the ring: neither a buffer nor the target is written too early."""
    source = torch.randn(1 << 20)
    target = torch.empty(1 << 20, device="cuda")
    with WeightStream(torch.device("cuda"), buffer_bytes=source.nbytes // 16) as stream:
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        target.fill_(7.0)
        stream.copy(target, source)
    assert torch.equal(target.cpu(), source)


PEAK_PROGRAM = """
import json, resource, torch
from tritonmind.models.weight_stream import WeightStream

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

device = torch.device("cuda")
with WeightStream(device) as stream:  # starts CUDA, and loads the kernels that both runs need
    stream.copy(torch.empty(5, dtype=torch.float16, device=device), torch.ones(5))
row = torch.randn(1, 1 << 20)
source = row.expand(512, -1)  # 2 GiB that take no memory until somebody copies them
target = torch.empty(source.shape, dtype=torch.float16, device=device)
before = peak_bytes()
with WeightStream(device) as stream:
    stream.copy(target, source)
grown = peak_bytes() - before
same = torch.equal(target[-1:].cpu(), row.half())
print(json.dumps({"grown": grown, "num_bytes": stream.num_bytes, "same": same}))
"""


@pytest.mark.gpu
def test_host_memory_stays_at_the_ring() -> None:
    backend = Path(__file__).resolve().parents[2] / "backend"
    program = f"import sys; sys.path.insert(0, {str(backend)!r})\n{PEAK_PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["same"] and result["num_bytes"] == 2 << 30
    assert result["grown"] < 512 << 20
