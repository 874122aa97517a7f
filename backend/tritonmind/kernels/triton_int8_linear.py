"""The kernel behind int8_linear.py: as triton_linear.py's, with levels that become numbers in registers.

A byte in the low bits of the mantissa of 1024 adds itself to that, which is exact; scales are applied to the sums.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels.int8_layout import Int8Weight
from tritonmind.kernels.pdl import let_next_start, use_pdl, wait
from tritonmind.kernels.tile_table import Tile
from tritonmind.kernels.triton_linear import prefetch_lines
from tritonmind.kernels.triton_w4_linear import uses_asm

# 1024 + byte in both halves, and less 1024 + 128: of the two low bytes of a word, and of the two high ones.
_LEVELS = """{
    .reg .b32 t, bias;
    mov.b32 bias, 0x64806480;
    prmt.b32 t, $2, 0x64646464, %s;
    sub.rn.f16x2 t, t, bias;
    mov.b32 {$0, $1}, t;
}"""
ASM_LOW = tl.constexpr(_LEVELS % "0x4140")
ASM_HIGH = tl.constexpr(_LEVELS % "0x4342")


@triton.jit
def _unpack(words, PLACE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Two levels of each word: [.., 2 * words] DTYPE."""
    if ASM and tl.float16 == DTYPE:
        even, odd = tl.inline_asm_elementwise(
            ASM_HIGH if PLACE else ASM_LOW, "=h,=h,r", [words], (tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        even = (((words >> (16 * PLACE)) & 0xFF).to(tl.float32) - 128.0).to(DTYPE)
        odd = (((words >> (16 * PLACE + 8)) & 0xFF).to(tl.float32) - 128.0).to(DTYPE)
    return tl.join(even, odd).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit(do_not_specialize=["num_rows"])
def _int8_linear_kernel(
    x_ptr,  # [num_rows, K]
    weight_ptr,  # words of int8_layout.py
    scales_ptr,  # [N] fp32
    out_ptr,  # [num_rows, N]
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr,  # blocks of K
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    EVEN_K: tl.constexpr = K % 64 == 0
    BLOCKS_OF_K: tl.constexpr = (K + 63) // 64
    BLOCKS_OF_N: tl.constexpr = (N + 31) // 32
    let_next_start(PDL)
    # The weight is the one thing that no kernel before writes.
    if PDL and PREFETCH:
        block_row = tl.program_id(1) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
        first = tl.minimum(block_row, BLOCKS_OF_N - 1).to(tl.int64) * (BLOCKS_OF_K * 512)
        prefetch_lines((weight_ptr + first)[:, None] + (tl.arange(0, 16 * PREFETCH) * 32)[None, :])
    wait(PDL)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < num_rows
    # Features beyond the last block read that again, and are not stored.
    block = tl.minimum(feature // 32, BLOCKS_OF_N - 1).to(tl.int64) * (BLOCKS_OF_K * 512)
    words_at = weight_ptr + (block + feature % 32 * 16)[:, None] + tl.arange(0, 16)[None, :]
    k = tl.arange(0, 32)[:, None]
    xs = x_ptr + row.to(tl.int64)[None, :] * K + k
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for at in range(0, BLOCKS_OF_K):
        words = tl.load(words_at + at * 512, eviction_policy="evict_first")
        for place in tl.static_range(2):
            inside = row_inside[None, :]
            if not EVEN_K:
                inside = inside & (k + (at * 64 + place * 32) < K)
            x = tl.load(xs + (at * 64 + place * 32), mask=inside, other=0.0)
            acc = tl.dot(_unpack(words, place, x_ptr.dtype.element_ty, ASM), x, acc)
    feature_inside = feature < N
    acc *= tl.load(scales_ptr + feature, mask=feature_inside, other=0.0)[:, None]
    out = out_ptr + row.to(tl.int64)[None, :] * N + feature[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=feature_inside[:, None] & row_inside[None, :])


def linear(x: torch.Tensor, weight: Int8Weight, out: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Launch on checked arguments; see int8_linear.int8_linear."""
    num_rows = len(x)
    if num_rows:
        pdl, own = use_pdl(x.device), weight.words.shape[1]
        _int8_linear_kernel[(triton.cdiv(num_rows, tile.block_m), triton.cdiv(weight.n, tile.block_n))](
            x, weight.words, weight.scales, out, num_rows,
            N=weight.n, K=weight.k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            PREFETCH=min(tile.prefetch, 1 << own.bit_length() >> 1), PDL=pdl, ASM=uses_asm(),
            num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl,
        )  # fmt: skip
    return out
