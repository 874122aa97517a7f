"""The kernel behind rotary.py: one program for a token and a KV head, with the query heads that share it."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels.pdl import let_next_start, use_pdl, wait
from tritonmind.kernels.triton_linear import load_sum


# Slices of a step's metadata start anywhere: without this, a change of alignment would compile while serving.
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr"])
def _rotary_kv_write_kernel(
    qkv_ptr,  # [T, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM], or [SPLITS, T, ...] fp32
    cos_sin_ptr,  # [max_pos, HEAD_DIM] fp32
    positions_ptr,  # [T]
    slot_mapping_ptr,  # [T]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,
    out_ptr,  # [T, NUM_HEADS, HEAD_DIM]
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # query heads of the group and the key head, to a power of two
    BLOCK_HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    qkv_row = qkv_ptr + token * WIDTH
    split_stride = num_tokens.to(tl.int64) * WIDTH
    let_next_start(PDL)
    wait(PDL)

    pair = tl.arange(0, BLOCK_HALF)
    angles = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * HEAD_DIM
    cos = tl.load(angles + pair, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF + pair, mask=pair < HALF, other=0.0)[None, :]

    row = tl.arange(0, BLOCK_ROWS)
    is_query = row < GROUP
    is_key = row == GROUP
    head = tl.where(is_query, kv_head * GROUP + row, NUM_HEADS + kv_head)
    element = head[:, None] * HEAD_DIM + pair[None, :]
    inside = (row <= GROUP)[:, None] & (pair < HALF)[None, :]
    first = load_sum(qkv_row + element, split_stride, inside, SPLITS)
    second = load_sum(qkv_row + element + HALF, split_stride, inside, SPLITS)
    rotated_first = (first * cos - second * sin).to(out_ptr.dtype.element_ty)
    rotated_second = (second * cos + first * sin).to(out_ptr.dtype.element_ty)
    out_row = out_ptr + token * NUM_HEADS * HEAD_DIM
    tl.store(out_row + element, rotated_first, mask=inside & is_query[:, None])
    tl.store(out_row + element + HALF, rotated_second, mask=inside & is_query[:, None])

    slot = tl.load(slot_mapping_ptr + token)
    if slot >= 0:
        block = (slot // BLOCK_SIZE).to(tl.int64)
        cache_row = ((block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
        key = k_cache_ptr + cache_row + pair[None, :] + tl.zeros_like(element)
        tl.store(key, rotated_first, mask=inside & is_key[:, None])
        tl.store(key + HALF, rotated_second, mask=inside & is_key[:, None])
        value_row = qkv_row + (NUM_HEADS + NUM_KV_HEADS + kv_head) * HEAD_DIM
        for half in tl.static_range(2):
            value = load_sum(value_row + half * HALF + pair, split_stride, pair < HALF, SPLITS)
            target = v_cache_ptr + cache_row + half * HALF + pair
            tl.store(target, value.to(v_cache_ptr.dtype.element_ty), mask=pair < HALF)


def rotary_kv_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch on checked arguments; see rotary.rotary_kv_write."""
    num_tokens, num_heads, head_dim = out.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    if num_tokens:
        pdl = use_pdl(qkv.device)
        _rotary_kv_write_kernel[(num_tokens, num_kv_heads)](
            qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, out, num_tokens,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
            BLOCK_ROWS=triton.next_power_of_2(num_heads // num_kv_heads + 1),
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            SPLITS=len(qkv) if qkv.dim() == 3 else 1, PDL=pdl, num_warps=1, launch_pdl=pdl,
        )  # fmt: skip
    return out
