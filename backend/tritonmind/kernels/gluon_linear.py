"""The kernel behind linear.gate_up for many rows on Hopper, in Gluon: one warp fetches tiles, two warp groups multiply.

A tile is 128 rows by 256 rows of the weight, 128 of the gate and 128 of the up half, which lie below each other in
shared memory, so that one instruction multiplies a warp group's 64 rows by all of them. Both of a feature end in
registers of one thread, and only what they make leaves the multiprocessor. The library's way would write both to
memory and read them again.

Programs stay, one to an SM. While the tile of one turn is stored, those of the next are on their way. At many rows the
card's power is the limit, and so what a product moves: the tiles are as large as registers allow, and programs work
side by side on a band of rows, whose rows and weights stay in the L2 cache meanwhile.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tritonmind.kernels import pdl, tuning
from tritonmind.kernels.gluon_hopper import (
    FETCH_REGISTERS,
    GROUP_REGISTERS,
    GROUP_WARPS,
    barrier,
    descriptor,
    fetch_tile,
    store,
)

GROUP_ROWS = gl.constexpr(64)
BLOCK_N, BLOCK_K, NUM_SLOTS = 128, 64, 4
BAND_TILES = gl.constexpr(16)  # of rows


@gluon.jit
def _tile_of(index, num_row_tiles, num_feature_tiles):
    """Row and feature tile of a turn: down the rows of a band first, so that neighbours share weights."""
    band_size = BAND_TILES * num_feature_tiles
    first = index // band_size * BAND_TILES
    rows = gl.minimum(num_row_tiles - first, BAND_TILES)
    return first + index % band_size % rows, index % band_size // rows


@gluon.jit
def _fetch(
    x_desc, weight_desc, tiles, num_row_tiles, num_feature_tiles,
    N: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, NUM_SLOTS: gl.constexpr,
):  # fmt: skip
    x_tiles, weight_tiles, full, free, _ = tiles
    tile_bytes: gl.constexpr = (2 * GROUP_ROWS + 2 * BLOCK_N) * BLOCK_K * x_desc.dtype.primitive_bitwidth // 8
    count = 0
    for index in range(gl.program_id(0), num_row_tiles * num_feature_tiles, gl.num_programs(0)):
        row_tile, feature_tile = _tile_of(index, num_row_tiles, num_feature_tiles)
        row = row_tile * 2 * GROUP_ROWS
        feature = feature_tile * BLOCK_N
        for k in range(0, K, BLOCK_K):
            slot = count % NUM_SLOTS
            mbarrier.wait(free.index(slot), ((count // NUM_SLOTS) & 1) ^ 1)
            mbarrier.expect(full.index(slot), tile_bytes)
            weights = weight_tiles.index(slot)
            fetch_tile(x_desc, [row, k], full.index(slot), x_tiles.index(2 * slot))
            fetch_tile(x_desc, [row + GROUP_ROWS, k], full.index(slot), x_tiles.index(2 * slot + 1))
            fetch_tile(weight_desc, [feature, k], full.index(slot), weights.slice(0, BLOCK_N))
            fetch_tile(weight_desc, [feature + N, k], full.index(slot), weights.slice(BLOCK_N, BLOCK_N))
            count += 1


@gluon.jit
def _multiply(
    half: gl.constexpr, out_desc, tiles, num_row_tiles, num_feature_tiles,
    K: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, NUM_SLOTS: gl.constexpr,
):  # fmt: skip
    x_tiles, weight_tiles, full, free, out_tiles = tiles
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 2 * BLOCK_N, 16])
    num_k: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    out_tile = out_tiles.index(half)
    count = 0
    for index in range(gl.program_id(0), num_row_tiles * num_feature_tiles, gl.num_programs(0)):
        row_tile, feature_tile = _tile_of(index, num_row_tiles, num_feature_tiles)
        sums = gl.full([GROUP_ROWS, 2 * BLOCK_N], 0.0, gl.float32, layout=SUMS)
        for i in range(0, num_k):
            slot = count % NUM_SLOTS
            mbarrier.wait(full.index(slot), (count // NUM_SLOTS) & 1)
            weights = weight_tiles.index(slot).permute((1, 0))
            sums = warpgroup_mma(x_tiles.index(2 * slot + half), weights, sums, use_acc=i > 0, is_async=True)
            # The product before this one has been made: its tiles may be fetched over.
            sums = warpgroup_mma_wait(1, deps=[sums])
            if i > 0:
                mbarrier.arrive(free.index((count - 1) % NUM_SLOTS), count=1)
            count += 1
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(free.index((count - 1) % NUM_SLOTS), count=1)
        gate, up = gl.split(sums.reshape([GROUP_ROWS, 2, BLOCK_N]).permute((0, 2, 1)))
        gated = gate / (1.0 + gl.exp(-gate)) * up
        store(out_desc, out_tile, gated, (2 * row_tile + half) * GROUP_ROWS, feature_tile * BLOCK_N)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_row_tiles"])
def _many_rows_kernel(
    x_desc,  # [num_rows, K], in tiles of [GROUP_ROWS, BLOCK_K]
    weight_desc,  # [2 * N, K], rows [gate | up], in tiles of [BLOCK_N, BLOCK_K]
    out_desc,  # [num_rows, N], in tiles of [GROUP_ROWS, BLOCK_N]
    num_row_tiles,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_SLOTS: gl.constexpr,
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    x_tiles = gl.allocate_shared_memory(dtype, [2 * NUM_SLOTS, GROUP_ROWS, BLOCK_K], x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(dtype, [NUM_SLOTS, 2 * BLOCK_N, BLOCK_K], weight_desc.layout)
    out_tiles = gl.allocate_shared_memory(dtype, [2, GROUP_ROWS, BLOCK_N], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], barriers)
    for slot in gl.static_range(NUM_SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)  # both groups let a slot go
    fence_async_shared()
    barrier()
    pdl.wait(PDL)
    pdl.let_next_start(PDL)
    num_feature_tiles: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles = (x_tiles, weight_tiles, full, free, out_tiles)
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply, (upper, out_desc, tiles, num_row_tiles, num_feature_tiles,
                         K, BLOCK_N, BLOCK_K, NUM_SLOTS)),
            (_multiply, (lower, out_desc, tiles, num_row_tiles, num_feature_tiles,
                         K, BLOCK_N, BLOCK_K, NUM_SLOTS)),
            (_fetch, (x_desc, weight_desc, tiles, num_row_tiles, num_feature_tiles,
                      N, K, BLOCK_N, BLOCK_K, NUM_SLOTS)),
        ],
        [4, 1],
        [GROUP_REGISTERS, FETCH_REGISTERS],
    )  # fmt: skip


def gate_up(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Launch on checked 2-byte arguments whose rows begin at multiples of 16 bytes, on Hopper; see linear.gate_up."""
    num_rows, n = out.shape
    if not num_rows:
        return out
    x_desc = descriptor(x, GROUP_ROWS.value, BLOCK_K)
    weight_desc = descriptor(weight, BLOCK_N, BLOCK_K)
    out_desc = descriptor(out, GROUP_ROWS.value, BLOCK_N)
    num_row_tiles = triton.cdiv(num_rows, 2 * GROUP_ROWS.value)
    num_tiles = num_row_tiles * triton.cdiv(n, BLOCK_N)
    use_pdl = pdl.use_pdl(x.device)
    _many_rows_kernel[(min(tuning.card(x.device).num_sms, num_tiles),)](
        x_desc, weight_desc, out_desc, num_row_tiles,
        N=n, K=x.shape[1], BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, NUM_SLOTS=NUM_SLOTS, PDL=use_pdl,
        num_warps=GROUP_WARPS, launch_pdl=use_pdl,
    )  # fmt: skip
    return out
