"""The kernel behind w4_linear.py for more than a few rows on Hopper, in Gluon: one warp fetches tiles, two or three
warp groups unpack a 4-bit weight in registers, from where the tensor cores take it.

As in triton_w4_linear.py the weight is the left operand, and the product comes out transposed. A group has WIDTH rows
of the weight, one group's below the other's, and all groups multiply theirs by the same BLOCK_M rows of x. While the
tensor cores multiply by 32 columns of the weight, its group unpacks the next. Of a tile the multiprocessor reads the
rows and a quarter of what a 16-bit weight takes, which at many rows, where the card's power is the limit, is less than
any kernel for those can do with.

Programs stay, one to an SM, and take tiles in turn. While the one of one turn is stored, those of the next come in, and
the first of the weight come while the kernel before still runs.
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

from tritonmind.kernels import pdl, tuning, w4_layout
from tritonmind.kernels.gluon_hopper import (
    FETCH_REGISTERS,
    GROUP_REGISTERS,
    GROUP_WARPS,
    barrier,
    descriptor,
    fetch_tile,
    store,
)
from tritonmind.kernels.tile_table import GROUP_STORED, Tile
from tritonmind.kernels.triton_w4_linear import ASM_HIGH_SCALED, ASM_LOW_SCALED
from tritonmind.kernels.w4_layout import PackedWeight

THREE_GROUP_REGISTERS = gl.constexpr(160)
BAND_ROWS = gl.constexpr(1024)
BLOCK_K = gl.constexpr(w4_layout.BLOCK_K)
WORDS = gl.constexpr(w4_layout.WORDS)
WORD_ROWS = gl.constexpr(w4_layout.BLOCK_ROWS)
PLACES = gl.constexpr(w4_layout.SLICES)  # of a word; columns of the weight that are multiplied at a time: 32
PLACE_K = gl.constexpr(w4_layout.BLOCK_K // w4_layout.SLICES)
LINE_K = gl.constexpr(64)  # of x, as many as a line of shared memory holds
OUT_FEATURES = gl.constexpr(GROUP_STORED)

# $2: a word, $3: a group's params, $4: its two scales. Level less zero point has 4 bits and a sign, and the low scale 3
# bits: of the products only the last is rounded.
_BF16_SCALED = """{
    .reg .b32 t, zz, r, high, low; .reg .b16 s, z, h, l;
    mov.b32 {s, z}, $3;
    mov.b32 zz, {z, z};
    mov.b32 {h, l}, $4;
    mov.b32 high, {h, h};
    mov.b32 low, {l, l};
    lop3.b32 t, $2, 0x000f000f, 0x43004300, 0xea;
    add.rn.bf16x2 t, t, zz;
    mul.rn.bf16x2 r, t, low;
    fma.rn.bf16x2 t, t, high, r;
    mov.b32 {$0, $1}, t;
}"""
ASM_BF16_SCALED = gl.constexpr(_BF16_SCALED)


@gluon.jit
def _turn(index, num_row_tiles, NUM_FEATURE_TILES: gl.constexpr, BLOCK_M: gl.constexpr, SPLITS: gl.constexpr):
    """Row tile, feature tile and split of a turn: down the rows of a band first, so that neighbours share weights."""
    split = index % SPLITS
    index = index // SPLITS
    band: gl.constexpr = BAND_ROWS // BLOCK_M
    band_size: gl.constexpr = band * NUM_FEATURE_TILES
    first = index // band_size * band
    rows = gl.minimum(num_row_tiles - first, band)
    return first + index % band_size % rows, index % band_size // rows, split


@gluon.jit
def _two_scales(params):
    """A scale has more bits than bf16: as the sum of two of these, the larger in the low half."""
    scale = params.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    high = scale.to(gl.bfloat16)
    low = (scale - high.to(gl.float32)).to(gl.bfloat16)
    return high.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF | low.to(gl.int16, bitcast=True).to(gl.int32) << 16


@gluon.jit
def _over_words(params, SHAPE: gl.constexpr):
    return gl.expand_dims(params, 1).broadcast_to(SHAPE)


@gluon.jit
def _unpack(words, params, PLACE: gl.constexpr, DTYPE: gl.constexpr, LEFT: gl.constexpr):
    """The levels at PLACE of each word less their zero points, times their scales: [.., PLACE_K] DTYPE.

    params: int32, one for each row of words.
    """
    if gl.bfloat16 == DTYPE:
        scales = _over_words(_two_scales(params), words.shape)
        even, odd = gl.inline_asm_elementwise(
            ASM_BF16_SCALED, "=h,=h,r,r,r", [words >> (4 * PLACE), _over_words(params, words.shape), scales],
            (gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        even, odd = gl.inline_asm_elementwise(
            ASM_HIGH_SCALED if PLACE % 2 else ASM_LOW_SCALED, "=h,=h,r,r",
            [words >> (8 * (PLACE // 2)), _over_words(params, words.shape)],
            (gl.float16, gl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    weight = gl.join(even, odd).reshape([words.shape[0], 2 * words.shape[1]])
    return gl.convert_layout(weight, LEFT, assert_trivial=True)


@gluon.jit
def _fetch_words(
    words_desc, tiles, slot, feature_tile, block, expected,
    BLOCKS_OF_K: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """A block of the weight to a free slot. expected: bytes that come with it."""
    _, word_tiles, full, _, _, _ = tiles
    ready = full.index(HALVES * slot)
    mbarrier.expect(ready, expected + BLOCK_N * WORDS * 4)
    first_line = feature_tile * (BLOCK_N // WORD_ROWS) * BLOCKS_OF_K
    for part in gl.static_range(BLOCK_N // WORD_ROWS):
        words = word_tiles[part * WORD_ROWS // WIDTH].index(slot).slice(part * WORD_ROWS % WIDTH, WORD_ROWS)
        fetch_tile(words_desc, [(first_line + part * BLOCKS_OF_K + block) * WORD_ROWS, 0], ready, words)


@gluon.jit
def _fetch(
    x_desc, words_desc, tiles, num_row_tiles,
    N: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr,
    SPLITS: gl.constexpr, NUM_SLOTS: gl.constexpr, HALVES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    x_tiles, _, full, free, _, _ = tiles
    num_feature_tiles: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks_of_k: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    line_bytes: gl.constexpr = BLOCK_M * LINE_K * x_desc.dtype.primitive_bitwidth // 8
    half_bytes: gl.constexpr = 2 // HALVES * line_bytes
    # The weight waits for no kernel: what there are slots for comes while the kernel before ends.
    _, feature_tile, split = _turn(gl.program_id(0), num_row_tiles, num_feature_tiles, BLOCK_M, SPLITS)
    first_block = split * blocks_of_k // SPLITS
    num_early = gl.minimum((split + 1) * blocks_of_k // SPLITS - first_block, NUM_SLOTS)
    for slot in range(num_early):
        block = first_block + slot
        _fetch_words(words_desc, tiles, slot, feature_tile, block, half_bytes, blocks_of_k, BLOCK_N, WIDTH, HALVES)
    pdl.wait(PDL)
    count = 0
    for index in range(gl.program_id(0), num_row_tiles * num_feature_tiles * SPLITS, gl.num_programs(0)):
        row_tile, feature_tile, split = _turn(index, num_row_tiles, num_feature_tiles, BLOCK_M, SPLITS)
        for block in range(split * blocks_of_k // SPLITS, (split + 1) * blocks_of_k // SPLITS):
            slot = count % NUM_SLOTS
            phase = (count // NUM_SLOTS) & 1
            for half in gl.static_range(2):
                ready = full.index(HALVES * slot + half % HALVES)
                if half < HALVES:
                    mbarrier.wait(free.index(HALVES * slot + half), phase ^ 1)
                    if half == 1:
                        mbarrier.expect(ready, half_bytes)
                    elif count >= num_early:
                        # Where the first half of rows is free, words have been read.
                        _fetch_words(
                            words_desc, tiles, slot, feature_tile, block, half_bytes,
                            blocks_of_k, BLOCK_N, WIDTH, HALVES,
                        )  # fmt: skip
                at = [row_tile * BLOCK_M, block * BLOCK_K + half * LINE_K]
                fetch_tile(x_desc, at, ready, x_tiles.index(2 * slot + half))
            count += 1


@gluon.jit
def _fetch_sum(out_desc, out_tile, row, feature, fetched):
    """What a product is added to, to where it will be stored from."""
    tma.store_wait(0)
    barrier()
    mbarrier.expect(fetched, out_desc.block_type.nbytes)
    fetch_tile(out_desc, [row, feature], fetched, out_tile)


@gluon.jit
def _store_sum(out_desc, out_tile, values, row, feature, fetched, phase):
    mbarrier.wait(fetched, phase)
    store(out_desc, out_tile, values + out_tile.load(values.type.layout).to(gl.float32), row, feature)


@gluon.jit
def _store_product(
    sums, out_desc, out_tile, row, feature, fetched, turn, GATED: gl.constexpr, ADD: gl.constexpr
):  # fmt: skip
    """The sums [features, rows] to rows from `row` and features from `feature` on of what out_desc is of.

    ADD: to what stands there, of which the first OUT_FEATURES have been fetched in this turn.
    """
    WIDTH: gl.constexpr = sums.shape[0]
    BLOCK_M: gl.constexpr = sums.shape[1]
    if GATED:
        gate, up = gl.split(sums.reshape([WIDTH // 16, 2, 8, BLOCK_M]).permute((0, 2, 3, 1)))
        gated = (gate / (1.0 + gl.exp(-gate)) * up).reshape([WIDTH // 2, BLOCK_M])
        store(out_desc, out_tile, gated.permute((1, 0)), row, feature // 2)
    elif WIDTH == OUT_FEATURES:
        if ADD:
            _store_sum(out_desc, out_tile, sums.permute((1, 0)), row, feature, fetched, turn & 1)
        else:
            store(out_desc, out_tile, sums.permute((1, 0)), row, feature)
    else:
        gl.static_assert(WIDTH == 2 * OUT_FEATURES)
        first, second = gl.split(sums.reshape([2, OUT_FEATURES, BLOCK_M]).permute((2, 1, 0)))
        if ADD:
            _store_sum(out_desc, out_tile, first, row, feature, fetched, 0)
            _fetch_sum(out_desc, out_tile, row, feature + OUT_FEATURES, fetched)
            _store_sum(out_desc, out_tile, second, row, feature + OUT_FEATURES, fetched, 1)
        else:
            store(out_desc, out_tile, first, row, feature)
            store(out_desc, out_tile, second, row, feature + OUT_FEATURES)


@gluon.jit
def _store_part(sums, parts_ptr, num_rows, split, row, feature, N: gl.constexpr, SUMS: gl.constexpr):
    rows = gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, SUMS))
    features = gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, SUMS))
    at = parts_ptr + (split * num_rows + row).to(gl.int64) * N + feature
    inside = (row + rows < num_rows)[None, :] & (feature + features < N)[:, None]
    gl.store(at + (rows * N)[None, :] + features[:, None], sums, mask=inside)


@gluon.jit
def _multiply(
    group: gl.constexpr, params_ptr, bias_ptr, out_desc, parts_ptr, tiles, num_row_tiles, num_rows,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, ADD: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, SPLITS: gl.constexpr,
    NUM_SLOTS: gl.constexpr, HALVES: gl.constexpr, PDL: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    x_tiles, word_tiles, full, free, out_tiles, fetched = tiles
    num_feature_tiles: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks_of_k: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    blocks_of_n: gl.constexpr = (N + WORD_ROWS - 1) // WORD_ROWS
    GROUPS: gl.constexpr = BLOCK_K // GROUP
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    # Each thread has the words of which it needs both halves.
    OWN_WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0], [0, 4], [0, 8]] + ([[64, 0]] if WIDTH == 128 else []),
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [WIDTH, WORDS],
    )  # fmt: skip
    line = gl.arange(0, WIDTH, layout=gl.SliceLayout(1, OWN_WORDS))
    out_tile = out_tiles[group]
    own_fetched = fetched.index(group)
    pdl.wait(PDL)
    count = 0
    turn = 0
    for index in range(gl.program_id(0), num_row_tiles * num_feature_tiles * SPLITS, gl.num_programs(0)):
        row_tile, feature_tile, split = _turn(index, num_row_tiles, num_feature_tiles, BLOCK_M, SPLITS)
        first_block = split * blocks_of_k // SPLITS
        end_block = (split + 1) * blocks_of_k // SPLITS
        row = row_tile * BLOCK_M
        feature = feature_tile * BLOCK_N + group * WIDTH
        if ADD:
            _fetch_sum(out_desc, out_tile, row, feature, own_fetched)
        # Features beyond the last block have its params, and are not stored.
        weight_block = gl.minimum((feature + line) // WORD_ROWS, blocks_of_n - 1)
        params_at = params_ptr + weight_block * (blocks_of_k * GROUPS * WORD_ROWS) + line % WORD_ROWS
        params = gl.load(params_at + first_block * GROUPS * WORD_ROWS)
        next_group = gl.minimum(first_block * GROUPS + 1, blocks_of_k * GROUPS - 1)
        next_params = gl.load(params_at + next_group * WORD_ROWS)
        sums = gl.full([WIDTH, BLOCK_M], 0.0, gl.float32, layout=SUMS)
        mbarrier.wait(full.index(HALVES * (count % NUM_SLOTS)), (count // NUM_SLOTS) & 1)
        words = word_tiles[group].index(count % NUM_SLOTS).load(OWN_WORDS)
        weight = _unpack(words, params, 0, DTYPE, LEFT)
        for block in range(first_block, end_block):
            slot = count % NUM_SLOTS
            next_slot = (count + 1) % NUM_SLOTS
            # The compiler lets products run beside other work only within a turn of the loop, whose last unpacks for
            # the next.
            for place in gl.static_range(PLACES):
                if HALVES == 2 and place * PLACE_K == LINE_K:
                    mbarrier.wait(full.index(2 * slot + 1), (count // NUM_SLOTS) & 1)
                x = x_tiles.index(2 * slot + place * PLACE_K // LINE_K)
                x = x.slice(place * PLACE_K % LINE_K, PLACE_K, dim=1).permute((1, 0))
                sums = warpgroup_mma(weight, x, sums, use_acc=(block > first_block) | (place > 0), is_async=True)
                if place > 0:
                    # The product before this one has been made: its weights' registers may be written to.
                    sums = warpgroup_mma_wait(1, deps=[sums])
                if HALVES == 2 and place * PLACE_K == LINE_K:
                    mbarrier.arrive(free.index(2 * slot), count=1)
                if (place + 1) * PLACE_K % GROUP == 0:
                    params = next_params
                    next_group = block * GROUPS + (place + 1) * PLACE_K // GROUP + 1
                    next_params = gl.load(params_at + gl.minimum(next_group, blocks_of_k * GROUPS - 1) * WORD_ROWS)
                if place == PLACES - 1:
                    phase = ((count + 1) // NUM_SLOTS) & 1
                    mbarrier.wait(full.index(HALVES * next_slot), phase, pred=block + 1 < end_block)
                    words = word_tiles[group].index(next_slot).load(OWN_WORDS)
                weight = _unpack(words, params, (place + 1) % PLACES, DTYPE, LEFT)
            sums, weight = warpgroup_mma_wait(0, deps=[sums, weight])
            mbarrier.arrive(free.index(HALVES * slot + HALVES - 1), count=1)
            count += 1
        if bias_ptr is not None:
            features = gl.arange(0, WIDTH, layout=gl.SliceLayout(1, SUMS))
            inside = (features < N - feature) & (split == 0)
            bias = gl.load(bias_ptr + feature + features, mask=inside, other=0.0)
            sums += bias.to(gl.float32)[:, None]
        if SPLITS > 1:
            _store_part(sums, parts_ptr, num_rows, split, row, feature, N, SUMS)
        else:
            _store_product(sums, out_desc, out_tile, row, feature, own_fetched, turn, GATED, ADD)
        turn += 1  # noqa: SIM113 - Triton has no enumerate
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_row_tiles", "num_rows"])
def _w4_many_rows_kernel(
    x_desc,  # [num_rows, K], in tiles of [BLOCK_M, LINE_K]
    words_desc,  # of w4_layout.py, one line for a row's in a block; in tiles of [WORD_ROWS, WORDS]
    params_ptr,
    bias_ptr,  # [N] or None
    out_desc,  # [num_rows, N], or GATED [num_rows, N / 2]
    parts_ptr,  # if SPLITS > 1, where sums go to: [SPLITS, num_rows, N] fp32
    num_row_tiles,
    num_rows,
    N: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    GATED: gl.constexpr,
    ADD: gl.constexpr,  # to what is in out
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WIDTH: gl.constexpr,  # of BLOCK_N, a warp group's
    SPLITS: gl.constexpr,
    NUM_SLOTS: gl.constexpr,
    HALVES: gl.constexpr,  # that a slot's rows of x come in and are let go in: two where slots are few
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    num_groups: gl.constexpr = BLOCK_N // WIDTH
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    gl.static_assert(BLOCK_K == 2 * LINE_K)
    x_tiles = gl.allocate_shared_memory(dtype, [2 * NUM_SLOTS, BLOCK_M, LINE_K], x_desc.layout)
    words_0 = gl.allocate_shared_memory(gl.int32, [NUM_SLOTS, WIDTH, WORDS], words_desc.layout)
    words_1 = gl.allocate_shared_memory(gl.int32, [NUM_SLOTS, WIDTH, WORDS], words_desc.layout)
    out_0 = gl.allocate_shared_memory(dtype, out_desc.block_shape, out_desc.layout)
    out_1 = gl.allocate_shared_memory(dtype, out_desc.block_shape, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [HALVES * NUM_SLOTS, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [HALVES * NUM_SLOTS, 1], barriers)
    fetched = gl.allocate_shared_memory(gl.int64, [4, 1], barriers)
    for slot in gl.static_range(HALVES * NUM_SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=num_groups)
    for group in gl.static_range(num_groups):
        mbarrier.init(fetched.index(group), count=1)
    fence_async_shared()
    barrier()
    pdl.let_next_start(PDL)
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    two: gl.constexpr = 2
    if num_groups == 2:
        tiles = (x_tiles, (words_0, words_1), full, free, (out_0, out_1), fetched)
        gl.warp_specialize(
            [
                (_multiply, (zero, params_ptr, bias_ptr, out_desc, parts_ptr, tiles, num_row_tiles, num_rows,
                             N, K, GROUP, GATED, ADD, BLOCK_M, BLOCK_N, WIDTH, SPLITS, NUM_SLOTS, HALVES, PDL, dtype)),
                (_multiply, (one, params_ptr, bias_ptr, out_desc, parts_ptr, tiles, num_row_tiles, num_rows,
                             N, K, GROUP, GATED, ADD, BLOCK_M, BLOCK_N, WIDTH, SPLITS, NUM_SLOTS, HALVES, PDL, dtype)),
                (_fetch, (x_desc, words_desc, tiles, num_row_tiles,
                          N, K, BLOCK_M, BLOCK_N, WIDTH, SPLITS, NUM_SLOTS, HALVES, PDL)),
            ],
            [4, 1],
            [GROUP_REGISTERS, FETCH_REGISTERS],
        )  # fmt: skip
    else:
        words_2 = gl.allocate_shared_memory(gl.int32, [NUM_SLOTS, WIDTH, WORDS], words_desc.layout)
        out_2 = gl.allocate_shared_memory(dtype, out_desc.block_shape, out_desc.layout)
        more_tiles = (x_tiles, (words_0, words_1, words_2), full, free, (out_0, out_1, out_2), fetched)
        gl.warp_specialize(
            [
                (_multiply, (zero, params_ptr, bias_ptr, out_desc, parts_ptr, more_tiles, num_row_tiles, num_rows,
                             N, K, GROUP, GATED, ADD, BLOCK_M, BLOCK_N, WIDTH, SPLITS, NUM_SLOTS, HALVES, PDL, dtype)),
                (_multiply, (one, params_ptr, bias_ptr, out_desc, parts_ptr, more_tiles, num_row_tiles, num_rows,
                             N, K, GROUP, GATED, ADD, BLOCK_M, BLOCK_N, WIDTH, SPLITS, NUM_SLOTS, HALVES, PDL, dtype)),
                (_multiply, (two, params_ptr, bias_ptr, out_desc, parts_ptr, more_tiles, num_row_tiles, num_rows,
                             N, K, GROUP, GATED, ADD, BLOCK_M, BLOCK_N, WIDTH, SPLITS, NUM_SLOTS, HALVES, PDL, dtype)),
                (_fetch, (x_desc, words_desc, more_tiles, num_row_tiles,
                          N, K, BLOCK_M, BLOCK_N, WIDTH, SPLITS, NUM_SLOTS, HALVES, PDL)),
            ],
            [4, 4, 1],
            [THREE_GROUP_REGISTERS, THREE_GROUP_REGISTERS, FETCH_REGISTERS],
        )  # fmt: skip


def multiply(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
    *,
    add: bool = False,
) -> torch.Tensor:
    """Launch on checked arguments, on Hopper, K and what out has in a row multiples of 8.

    out: [T, N], or [T, N / 2] of a gated weight, or [tile.splits, T, N] fp32. add: to what is in out, if tile.splits is
    1; see w4_linear.w4_linear and w4_gate_up.
    """
    num_rows = len(x)
    if not num_rows:
        return out
    is_split = tile.splits > 1
    # Partial sums go another way.
    stored = x if is_split else out
    width = OUT_FEATURES.value if not weight.is_gated else min(OUT_FEATURES.value, tile.block_n // 2)
    x_desc = descriptor(x, tile.block_m, LINE_K.value)
    words_desc = descriptor(weight.words.view(-1, WORDS.value), WORD_ROWS.value, WORDS.value)
    out_desc = descriptor(stored, tile.block_m, width)
    num_row_tiles = triton.cdiv(num_rows, tile.block_m)
    block_n = tile.warp_groups * tile.block_n
    num_tiles = num_row_tiles * triton.cdiv(weight.n, block_n) * tile.splits
    use_pdl = pdl.use_pdl(x.device)
    _w4_many_rows_kernel[(min(tuning.card(x.device).num_sms, num_tiles),)](
        x_desc, words_desc, weight.params, bias, out_desc, out, num_row_tiles, num_rows,
        N=weight.n, K=weight.k, GROUP=weight.group_size, GATED=weight.is_gated, ADD=add, BLOCK_M=tile.block_m,
        BLOCK_N=block_n, WIDTH=tile.block_n, SPLITS=tile.splits, NUM_SLOTS=tile.num_stages,
        HALVES=2 if tile.num_stages == 2 else 1, PDL=use_pdl, num_warps=GROUP_WARPS, launch_pdl=use_pdl,
    )  # fmt: skip
    return out
