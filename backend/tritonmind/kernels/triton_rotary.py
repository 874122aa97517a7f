"""The kernel behind rotary.py: one program for a token and some of its heads, which lie side by side."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels.flat_pages import FlatPages
from tritonmind.kernels.head_norms import HeadNorms
from tritonmind.kernels.kv_quant import KVScales
from tritonmind.kernels.pdl import let_next_start, use_pdl, wait
from tritonmind.kernels.triton_int8 import MAX_LEVEL, MIN_SCALE, dequantise, kind_of, quantise, scale_arguments
from tritonmind.kernels.triton_linear import load_sum

BLOCK_ELEMENTS = 2048  # of a program: few enough to spread one token over the card


@triton.jit
def _halves(weight_ptr, pair, is_pair, HALF: tl.constexpr):
    """Both halves of a norm's weight, [1, BLOCK_HALF] fp32 each."""
    first = tl.load(weight_ptr + pair, mask=is_pair, other=0.0).to(tl.float32)
    second = tl.load(weight_ptr + HALF + pair, mask=is_pair, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


# Slices of a step's metadata start anywhere: without this, a change of alignment would compile while serving.
@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr"],
)
def _rotary_kv_write_kernel(
    qkv_ptr,  # [T, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM], heads [q | k | v], or [SPLITS, T, ...] fp32
    cos_sin_ptr,  # [max_pos, HEAD_DIM] fp32
    positions_ptr,  # [T]
    slot_mapping_ptr,  # [T]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,
    q_norm_ptr,  # [HEAD_DIM]; read when QK_NORM, as the next two
    k_norm_ptr,
    norm_eps,
    query_scales_ptr,  # [max_pos] fp32; read when QUERY_SCALES
    k_scale,  # of the layer; with SCALES "token": pools [num_blocks, NUM_KV_HEADS, BLOCK_SIZE] fp32
    v_scale,
    k_zero,
    v_zero,
    flat_k_ptr,  # pages of prompts [capacity, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]; used when FLAT, as the next two
    flat_v_ptr,
    flat_slots_ptr,  # [T]
    out_ptr,  # [T, NUM_HEADS, HEAD_DIM]
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    QK_NORM: tl.constexpr,
    QUERY_SCALES: tl.constexpr,
    SCALES: tl.constexpr,  # of caches that are bytes: "layer" or "token", else None
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair = tl.arange(0, BLOCK_HALF)
    is_query = (head < NUM_HEADS)[:, None]
    is_key = ((head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS))[:, None]
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (pair < HALF)[None, :]
    element = head[:, None] * HEAD_DIM + pair[None, :]
    let_next_start(PDL)
    wait(PDL)

    slot = tl.load(slot_mapping_ptr + token)
    position = tl.load(positions_ptr + token).to(tl.int64)
    angles = cos_sin_ptr + position * HEAD_DIM
    cos = tl.load(angles + pair, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    split_stride = num_tokens.to(tl.int64) * WIDTH
    first = load_sum(qkv_ptr + token * WIDTH + element, split_stride, inside, SPLITS)
    second = load_sum(qkv_ptr + token * WIDTH + HALF + element, split_stride, inside, SPLITS)
    if QK_NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        shrink = tl.rsqrt(squares / HEAD_DIM + norm_eps)[:, None]
        is_pair = pair < HALF
        q_weight, q_weight_2 = _halves(q_norm_ptr, pair, is_pair, HALF)
        k_weight, k_weight_2 = _halves(k_norm_ptr, pair, is_pair, HALF)
        first = tl.where(is_value, first, first * shrink * tl.where(is_query, q_weight, k_weight))
        second = tl.where(is_value, second, second * shrink * tl.where(is_query, q_weight_2, k_weight_2))
    turned_first = tl.where(is_value, first, first * cos - second * sin)
    turned_second = tl.where(is_value, second, second * cos + first * sin)

    if QUERY_SCALES:
        query_scale = tl.where(is_query, tl.load(query_scales_ptr + position), 1.0)
        turned_first = turned_first * query_scale
        turned_second = turned_second * query_scale
    query = out_ptr + token * NUM_HEADS * HEAD_DIM + element
    tl.store(query, turned_first.to(out_ptr.dtype.element_ty), mask=inside & is_query)
    tl.store(query + HALF, turned_second.to(out_ptr.dtype.element_ty), mask=inside & is_query)
    if slot >= 0:
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        page_row = ((slot // BLOCK_SIZE).to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
        cached = page_row[:, None] * HEAD_DIM + pair[None, :]
        if SCALES == "token":
            both = tl.where(inside, tl.maximum(tl.abs(turned_first), tl.abs(turned_second)), 0.0)
            scale = tl.maximum(tl.max(both, axis=1) / MAX_LEVEL, MIN_SCALE)
            is_head = head < NUM_HEADS + 2 * NUM_KV_HEADS
            tl.store(k_scale + page_row, scale, mask=is_head & (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS))
            tl.store(v_scale + page_row, scale, mask=is_head & (head >= NUM_HEADS + NUM_KV_HEADS))
            scale, zero = scale[:, None], 0.0
            stored_first = quantise(turned_first, 1.0 / scale)
            stored_second = quantise(turned_second, 1.0 / scale)
        elif SCALES == "layer":
            scale, zero = tl.where(is_value, v_scale, k_scale), tl.where(is_value, v_zero, k_zero)
            stored_first = quantise(turned_first - zero, 1.0 / scale)
            stored_second = quantise(turned_second - zero, 1.0 / scale)
        else:
            stored_first = turned_first.to(k_cache_ptr.dtype.element_ty)
            stored_second = turned_second.to(k_cache_ptr.dtype.element_ty)
        tl.store(k_cache_ptr + cached, stored_first, mask=inside & is_key)
        tl.store(k_cache_ptr + cached + HALF, stored_second, mask=inside & is_key)
        tl.store(v_cache_ptr + cached, stored_first, mask=inside & is_value)
        tl.store(v_cache_ptr + cached + HALF, stored_second, mask=inside & is_value)
        if FLAT:
            flat_slot = tl.load(flat_slots_ptr + token)
            if flat_slot >= 0:
                flat_row = (flat_slot // BLOCK_SIZE).to(tl.int64) * NUM_KV_HEADS + kv_head
                flat = (flat_row * BLOCK_SIZE + flat_slot % BLOCK_SIZE)[:, None] * HEAD_DIM + pair[None, :]
                flat_first = dequantise(stored_first, scale, zero).to(flat_k_ptr.dtype.element_ty)
                flat_second = dequantise(stored_second, scale, zero).to(flat_k_ptr.dtype.element_ty)
                tl.store(flat_k_ptr + flat, flat_first, mask=inside & is_key)
                tl.store(flat_k_ptr + flat + HALF, flat_second, mask=inside & is_key)
                tl.store(flat_v_ptr + flat, flat_first, mask=inside & is_value)
                tl.store(flat_v_ptr + flat + HALF, flat_second, mask=inside & is_value)


def rotary_kv_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    norms: HeadNorms | None,
    query_scales: torch.Tensor | None,
    scales: KVScales | None,
    flat: FlatPages | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch on checked arguments; see rotary.rotary_kv_write."""
    num_tokens, num_heads, head_dim = out.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    if num_tokens:
        pdl, block_half = use_pdl(qkv.device), triton.next_power_of_2(head_dim // 2)
        scratch = (None, None, None) if flat is None else (flat.k, flat.v, flat.slots)
        q_norm, k_norm, norm_eps = norms or (None, None, 0.0)
        block_heads = BLOCK_ELEMENTS // (2 * block_half)
        _rotary_kv_write_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, block_heads))](
            qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm, k_norm, norm_eps, query_scales,
            *scale_arguments(scales), *scratch, out, num_tokens,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
            BLOCK_HEADS=block_heads, BLOCK_HALF=block_half, SPLITS=len(qkv) if qkv.dim() == 3 else 1,
            QK_NORM=norms is not None, QUERY_SCALES=query_scales is not None, SCALES=kind_of(scales),
            FLAT=flat is not None, PDL=pdl, num_warps=2, launch_pdl=pdl,
        )  # fmt: skip
    return out
