"""The kernels behind w4_linear.py: products with a 4-bit weight, which is unpacked in registers.

As in triton_linear.py the weight is the left operand of the tensor cores, which on Hopper they take from registers: a
level never goes through shared memory. Level less zero point is exact. Its scale is applied to the sums of a group, in
fp32, where rows are so few that these are fewer than pairs of weights; else to the weight itself, which it rounds.

Few rows leave columns of the tensor cores' narrowest tile empty, and too few warps reading. There a program cuts K into
slices, each with warps and columns of its own, which cost nothing, and adds them up.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels.pdl import let_next_start, use_pdl, wait
from tritonmind.kernels.tile_table import Tile
from tritonmind.kernels.triton_linear import prefetch_lines
from tritonmind.kernels.w4_layout import PackedWeight

# $2: a word, $3: a group's params. 1024 + q in both halves, for levels in the low bits of each, and less 1024 + z.
_LOW = """{
    .reg .b32 t, zz; .reg .b16 s, z;
    mov.b32 {s, z}, $3;
    mov.b32 zz, {z, z};
    lop3.b32 t, $2, 0x000f000f, 0x64006400, 0xea;
    add.rn.f16x2 t, t, zz;
"""
# 1024 + 16 q, over 16, and less 64 + z, which is 1024 + z less 960.
_HIGH = """{
    .reg .b32 t, zz, c, d; .reg .b16 s, z;
    mov.b32 {s, z}, $3;
    mov.b32 zz, {z, z};
    mov.b32 c, 0x63806380;
    mov.b32 d, 0x2c002c00;
    add.rn.f16x2 zz, zz, c;
    lop3.b32 t, $2, 0x00f000f0, 0x64006400, 0xea;
    fma.rn.f16x2 t, t, d, zz;
"""
# bf16 has 7 bits beside the leading one: only the lowest level of each half can be read so. sm_80 has no addition.
_BF16 = """{
    .reg .b32 t, zz, one; .reg .b16 s, z;
    mov.b32 {s, z}, $3;
    mov.b32 zz, {z, z};
    mov.b32 one, 0x3f803f80;
    lop3.b32 t, $2, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 t, t, one, zz;
"""
_SCALE = """
    .reg .b32 ss;
    mov.b32 ss, {s, s};
    mul.rn.f16x2 t, t, ss;
"""
_END = """
    mov.b32 {$0, $1}, t;
}"""
ASM_LOW = tl.constexpr(_LOW + _END)
ASM_HIGH = tl.constexpr(_HIGH + _END)
ASM_BF16 = tl.constexpr(_BF16 + _END)
ASM_LOW_SCALED = tl.constexpr(_LOW + _SCALE + _END)
ASM_HIGH_SCALED = tl.constexpr(_HIGH + _SCALE + _END)


@triton.jit
def _scale(params):
    """fp32"""
    return params.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scaled(even, odd, params, DTYPE: tl.constexpr):
    scale = _scale(params)
    return (even.to(tl.float32) * scale).to(DTYPE), (odd.to(tl.float32) * scale).to(DTYPE)


@triton.jit
def _unpack(words, params, PLACE: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The levels at PLACE of each word less their zero points, times their scales if SCALED: [.., 2 * words] DTYPE.

    words, params: int32 of one shape.
    """
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    if not ASM:
        BIAS: tl.constexpr = 128.0 if BF16 else 1024.0
        biased = (params >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) + BIAS
        even = (((words >> (4 * PLACE)) & 0xF).to(tl.float32) + biased).to(DTYPE)
        odd = (((words >> (4 * PLACE + 16)) & 0xF).to(tl.float32) + biased).to(DTYPE)
        if SCALED:
            even, odd = _scaled(even, odd, params, DTYPE)
    elif BF16:
        even, odd = tl.inline_asm_elementwise(
            ASM_BF16, "=h,=h,r,r", [words >> (4 * PLACE), params], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )
        if SCALED:
            even, odd = _scaled(even, odd, params, DTYPE)
    else:
        LOW: tl.constexpr = ASM_LOW_SCALED if SCALED else ASM_LOW
        HIGH: tl.constexpr = ASM_HIGH_SCALED if SCALED else ASM_HIGH
        even, odd = tl.inline_asm_elementwise(
            HIGH if PLACE % 2 else LOW, "=h,=h,r,r", [words >> (8 * (PLACE // 2)), params],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    return tl.join(even, odd).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def _load_slices(pointers, inside, EVEN: tl.constexpr):
    """Words or params, which are read once and need not stay in the cache; zeros where a slice has no block."""
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _prefetch(
    weight_ptr,
    params_ptr,
    first_block,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Bring COUNT blocks of K of the rows of program_id(1) to the L2 cache; nothing waits for them."""
    BLOCKS_OF_K: tl.constexpr = (K + 127) // 128
    GROUPS: tl.constexpr = 128 // GROUP
    rows = tl.program_id(1) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    blocks = tl.minimum(rows, (N + 31) // 32 - 1).to(tl.int64) * BLOCKS_OF_K + first_block
    # A block of 32 rows is 2 KB of words, and a line of params for each group.
    prefetch_lines((weight_ptr + blocks * 512)[:, None] + (tl.arange(0, 16 * COUNT) * 32)[None, :])
    prefetch_lines((params_ptr + blocks * (32 * GROUPS))[:, None] + (tl.arange(0, GROUPS * COUNT) * 32)[None, :])


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    params_ptr,
    num_rows,
    split,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Weight rows of program_id(1) times rows of x of program_id(0), over a split's blocks of K: fp32
    [BLOCK_N, BLOCK_M // SLICES].

    The tile that is multiplied has BLOCK_N rows of the weight for each slice of K, and as many columns for each slice.
    Of its products those of one slice with itself count, and are added up.
    """
    BLOCKS_OF_K: tl.constexpr = (K + 127) // 128
    BLOCKS_OF_N: tl.constexpr = (N + 31) // 32
    EVEN: tl.constexpr = K % 128 == 0 if SLICES == 1 else K % (128 * SPLITS * SLICES) == 0
    GROUPS: tl.constexpr = 128 // GROUP
    PLACES: tl.constexpr = GROUP // 32  # of a word, that belong to one group
    ROWS: tl.constexpr = BLOCK_M // SLICES
    SCALE_SUMS: tl.constexpr = 2 * BLOCK_M <= GROUP
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * ROWS + column % ROWS
    line = tl.arange(0, BLOCK_N * SLICES)
    feature = tl.program_id(1) * BLOCK_N + line % BLOCK_N
    first_block = split * BLOCKS_OF_K // SPLITS
    end_block = (split + 1) * BLOCKS_OF_K // SPLITS
    row_inside = row < num_rows
    # Features beyond the last block read that again, and are not stored. The slices take blocks in turn.
    block = tl.minimum(feature // 32, BLOCKS_OF_N - 1).to(tl.int64) * BLOCKS_OF_K + line // BLOCK_N
    words_at = weight_ptr + (block * 512 + feature % 32 * 16)[:, None] + tl.arange(0, 16)[None, :]
    params_at = params_ptr + block * (32 * GROUPS) + feature % 32
    k = (column // ROWS * 128)[None, :] + tl.arange(0, 32)[:, None]
    xs = x_ptr + row.to(tl.int64)[None, :] * K + k
    acc = tl.zeros((BLOCK_N * SLICES, BLOCK_M), tl.float32)
    for at in range(first_block, end_block, SLICES):
        has_block = line // BLOCK_N < end_block - at
        words = _load_slices(words_at + at * 512, has_block[:, None], EVEN)
        for place in tl.static_range(4):
            if place % PLACES == 0:
                params = _load_slices(params_at + at * (32 * GROUPS) + place // PLACES * 32, has_block, EVEN)
                spread = tl.broadcast_to(params[:, None], (BLOCK_N * SLICES, 16))
            x_inside = row_inside[None, :]
            if not EVEN:
                x_inside = x_inside & (k + (at * 128 + place * 32) < tl.minimum(end_block * 128, K))
            x = tl.load(xs + (at * 128 + place * 32), mask=x_inside, other=0.0)
            weight = _unpack(words, spread, place, not SCALE_SUMS, DTYPE, ASM)
            if not SCALE_SUMS:
                acc = tl.dot(weight, x, acc)
            elif place % PLACES == 0:
                part = tl.dot(weight, x)
            else:
                part = tl.dot(weight, x, part)
            if SCALE_SUMS and place % PLACES == PLACES - 1:
                acc += part * _scale(params)[:, None]
    if SLICES > 1:
        acc = tl.where((line // BLOCK_N)[:, None] == (column // ROWS)[None, :], acc, 0.0)
        acc = tl.sum(tl.sum(acc.reshape(SLICES, BLOCK_N, SLICES, ROWS), 2), 0)
    return acc


# num_rows is any number, and slices of x and out start at any row: neither may compile anew while serving.
@triton.jit(do_not_specialize=["num_rows"])
def _w4_linear_kernel(
    x_ptr,  # [num_rows, K]
    weight_ptr,  # words of w4_layout.py
    params_ptr,
    bias_ptr,  # [N] or None
    out_ptr,  # [num_rows, N], or [SPLITS, num_rows, N] fp32
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows times SLICES
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICES: tl.constexpr,
    PREFETCH: tl.constexpr,  # blocks of K
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    split = tl.program_id(2)
    let_next_start(PDL)
    # The weight is the one thing that no kernel before writes.
    if PDL and PREFETCH:
        _prefetch(weight_ptr, params_ptr, split * ((K + 127) // 128) // SPLITS, N, K, GROUP, BLOCK_N, PREFETCH)
    wait(PDL)
    acc = _product(x_ptr, weight_ptr, params_ptr, num_rows, split, N, K, GROUP, BLOCK_M, BLOCK_N, SPLITS, SLICES, ASM)
    ROWS: tl.constexpr = BLOCK_M // SLICES
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:  # noqa: SIM102 - known when it compiles, the other when it runs
        if split == 0:
            acc += tl.load(bias_ptr + feature, mask=feature < N, other=0.0).to(tl.float32)[:, None]
    inside = (feature < N)[:, None] & (row < num_rows)[None, :]
    out = out_ptr + (row + split * num_rows).to(tl.int64)[None, :] * N + feature[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _w4_gate_up_kernel(
    x_ptr,  # [num_rows, K]
    weight_ptr,  # words of w4_layout.py, gate and up in turn
    params_ptr,
    out_ptr,  # [num_rows, N // 2]
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of gate and up together
    SLICES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    let_next_start(PDL)
    if PDL and PREFETCH:
        _prefetch(weight_ptr, params_ptr, 0, N, K, GROUP, BLOCK_N, PREFETCH)
    wait(PDL)
    acc = _product(x_ptr, weight_ptr, params_ptr, num_rows, 0, N, K, GROUP, BLOCK_M, BLOCK_N, 1, SLICES, ASM)
    ROWS: tl.constexpr = BLOCK_M // SLICES
    gate, up = tl.split(acc.reshape(BLOCK_N // 16, 2, 8, ROWS).permute(0, 2, 3, 1))
    gated = (gate * tl.sigmoid(gate) * up).reshape(BLOCK_N // 2, ROWS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    inside = (feature < N // 2)[:, None] & (row < num_rows)[None, :]
    out = out_ptr + row.to(tl.int64)[None, :] * (N // 2) + feature[:, None]
    tl.store(out, gated.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _w4_dequantize_kernel(
    weight_ptr,
    params_ptr,
    out_ptr,  # [N, K], rows of gate before those of up
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    BLOCKS_OF_K: tl.constexpr = (K + 127) // 128
    GROUPS: tl.constexpr = 128 // GROUP
    let_next_start(PDL)
    wait(PDL)
    block = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, 32)
    words = tl.load(weight_ptr + block * 512 + (row * 16)[:, None] + tl.arange(0, 16)[None, :])
    feature = block // BLOCKS_OF_K * 32 + row
    inside = feature < N
    if GATED:
        feature = feature // 16 * 8 + feature % 8 + (feature % 16 // 8) * (N // 2)
    for place in tl.static_range(4):
        params = tl.load(params_ptr + block * (32 * GROUPS) + place * 32 // GROUP * 32 + row)
        spread = tl.broadcast_to(params[:, None], (32, 16))
        weight = _unpack(words, spread, place, True, out_ptr.dtype.element_ty, ASM)
        k = block % BLOCKS_OF_K * 128 + place * 32 + tl.arange(0, 32)
        tl.store(out_ptr + (feature * K)[:, None] + k[None, :], weight, mask=inside[:, None] & (k < K)[None, :])


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor, tile: Tile
) -> torch.Tensor:
    """Launch on checked arguments; see w4_linear.w4_linear. out: [T, N], or [tile.splits, T, N] fp32."""
    num_rows = len(x)
    if num_rows:
        pdl, rows = use_pdl(x.device), tile.block_m // tile.slices
        _w4_linear_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(weight.n, tile.block_n), tile.splits)](
            x, weight.words, weight.params, bias, out, num_rows,
            N=weight.n, K=weight.k, GROUP=weight.group_size, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            SPLITS=tile.splits, SLICES=tile.slices, PREFETCH=_num_prefetched(weight, tile),
            PDL=pdl, ASM=uses_asm(), num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl,
        )  # fmt: skip
    return out


def gate_up(x: torch.Tensor, weight: PackedWeight, out: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Launch on checked arguments; see w4_linear.w4_gate_up. tile.block_n counts features of the output."""
    num_rows = len(x)
    if num_rows:
        pdl, rows = use_pdl(x.device), tile.block_m // tile.slices
        _w4_gate_up_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(weight.n, 2 * tile.block_n))](
            x, weight.words, weight.params, out, num_rows,
            N=weight.n, K=weight.k, GROUP=weight.group_size, BLOCK_M=tile.block_m, BLOCK_N=2 * tile.block_n,
            SLICES=tile.slices, PREFETCH=_num_prefetched(weight, tile),
            PDL=pdl, ASM=uses_asm(), num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl,
        )  # fmt: skip
    return out


def dequantize(weight: PackedWeight, out: torch.Tensor) -> torch.Tensor:
    """Fill out, [n, k] of weight.dtype, with the weight, each value rounded once."""
    pdl = use_pdl(out.device)
    _w4_dequantize_kernel[(weight.words.shape[0] * weight.words.shape[1],)](
        weight.words, weight.params, out,
        N=weight.n, K=weight.k, GROUP=weight.group_size, GATED=weight.is_gated, PDL=pdl, ASM=uses_asm(),
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out


def _num_prefetched(weight: PackedWeight, tile: Tile) -> int:
    """Blocks of K that a program may fetch early: a power of two of its own ones."""
    own = weight.words.shape[1] // tile.splits
    return min(tile.prefetch, 1 << own.bit_length() >> 1)


def uses_asm() -> bool:
    """Whether levels are unpacked by PTX; the interpreter, which has none, computes the same."""
    return not triton.knobs.runtime.interpret
