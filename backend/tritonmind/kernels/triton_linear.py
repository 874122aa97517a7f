"""The kernels behind linear.py: products with few rows, which are bound by reading the weight once.

The weight is the left operand of the tensor cores and the rows are the right one: 8 rows fill their narrowest tile,
which the usual order would pad to 64. Where the output has too few tiles to keep the whole card reading, programs
share a reduction and store fp32 partial sums. Whoever reads those adds them up, always in one order (`load_sum`).
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels.pdl import let_next_start, use_pdl, wait
from tritonmind.kernels.tile_table import Tile


@triton.jit
def load_sum(pointers, split_stride, inside, SPLITS: tl.constexpr):
    """Values in fp32, each the sum of SPLITS partial ones that lie split_stride elements apart."""
    total = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(pointers + split * split_stride, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def prefetch_lines(pointers):
    """Bring the line of 128 bytes behind each pointer to the L2 cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _prefetch_rows(row_ptrs, COLUMNS: tl.constexpr):
    """Prefetch the first COLUMNS 2-byte elements behind each pointer."""
    LINE: tl.constexpr = 64  # of 128 bytes
    prefetch_lines(row_ptrs[:, None] + (tl.arange(0, COLUMNS // LINE) * LINE)[None, :])


@triton.jit
def _load_weight(pointers, columns, K: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile of the weight, which is read once and need not stay in the cache; zeros beyond K."""
    if EVEN_K:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=(columns < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_x(pointers, columns, row_inside, K: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile of x, [BLOCK_K, BLOCK_M]; zeros beyond K and beyond the rows."""
    if EVEN_K:
        return tl.load(pointers, mask=row_inside[None, :], other=0.0)
    return tl.load(pointers, mask=row_inside[None, :] & (columns < K)[:, None], other=0.0)


# num_rows is any number, and slices of x and out start at any row: neither may compile anew while serving.
@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,  # [num_rows, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    out_ptr,  # [num_rows, N], or [SPLITS, num_rows, N] fp32
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFETCH: tl.constexpr,  # columns of the weight
    PDL: tl.constexpr,
):
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    NUM_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    first_tile = split * NUM_TILES // SPLITS
    end_tile = (split + 1) * NUM_TILES // SPLITS
    row_inside = row < num_rows
    # Features beyond N read the last one again, and are not stored.
    weight_rows = weight_ptr + tl.minimum(feature, N - 1).to(tl.int64) * K
    let_next_start(PDL)
    # The weight is the one thing that no kernel before writes.
    if PDL and PREFETCH:
        _prefetch_rows(weight_rows + first_tile * BLOCK_K, PREFETCH)
    wait(PDL)

    k = tl.arange(0, BLOCK_K)
    weights = weight_rows[:, None] + k[None, :]
    xs = x_ptr + row.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(first_tile, end_tile):
        start = tile * BLOCK_K
        weight = _load_weight(weights + start, start + k, K, EVEN_K)
        # fp32 must not become tf32: the fp32 path is the exact one.
        acc = tl.dot(weight, _load_x(xs + start, start + k, row_inside, K, EVEN_K), acc, input_precision="ieee")
    if bias_ptr is not None:  # noqa: SIM102 - known when it compiles, the other when it runs
        if split == 0:
            acc += tl.load(bias_ptr + feature, mask=feature < N, other=0.0).to(tl.float32)[:, None]
    row += split * num_rows
    inside = (feature < N)[:, None] & row_inside[None, :]
    out = out_ptr + row.to(tl.int64)[None, :] * N + feature[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    x_ptr,  # [num_rows, K]
    weight_ptr,  # [2 * N, K], rows [gate | up]
    out_ptr,  # [num_rows, N]
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < num_rows
    gate_rows = weight_ptr + tl.minimum(feature, N - 1).to(tl.int64) * K
    up_rows = gate_rows + N * K
    let_next_start(PDL)
    if PDL and PREFETCH:
        _prefetch_rows(gate_rows, PREFETCH)
        _prefetch_rows(up_rows, PREFETCH)
    wait(PDL)

    k = tl.arange(0, BLOCK_K)
    gate_weights = gate_rows[:, None] + k[None, :]
    up_weights = up_rows[:, None] + k[None, :]
    xs = x_ptr + row.to(tl.int64)[None, :] * K + k[:, None]
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = _load_x(xs + start, start + k, row_inside, K, EVEN_K)
        gate = tl.dot(_load_weight(gate_weights + start, start + k, K, EVEN_K), x, gate, input_precision="ieee")
        up = tl.dot(_load_weight(up_weights + start, start + k, K, EVEN_K), x, up, input_precision="ieee")
    gated = gate * tl.sigmoid(gate) * up
    inside = (feature < N)[:, None] & row_inside[None, :]
    out = out_ptr + row.to(tl.int64)[None, :] * N + feature[:, None]
    tl.store(out, gated.to(out_ptr.dtype.element_ty), mask=inside)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, tile: Tile
) -> torch.Tensor:
    """Launch on checked arguments; see linear.linear. out: [T, N], or [tile.splits, T, N] fp32."""
    num_rows, (n, k) = len(x), weight.shape
    if num_rows:
        pdl = use_pdl(x.device)
        _linear_kernel[(triton.cdiv(num_rows, tile.block_m), triton.cdiv(n, tile.block_n), tile.splits)](
            x, weight, bias, out, num_rows,
            N=n, K=k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, SPLITS=tile.splits,
            PREFETCH=tile.prefetch * tile.block_k, PDL=pdl,
            num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl,
        )  # fmt: skip
    return out


def gate_up(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Launch on checked arguments; see linear.gate_up."""
    num_rows, n = out.shape
    if num_rows:
        pdl = use_pdl(x.device)
        _gate_up_kernel[(triton.cdiv(num_rows, tile.block_m), triton.cdiv(n, tile.block_n))](
            x, weight, out, num_rows,
            N=n, K=x.shape[1], BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            PREFETCH=tile.prefetch * tile.block_k, PDL=pdl,
            num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl,
        )  # fmt: skip
    return out
