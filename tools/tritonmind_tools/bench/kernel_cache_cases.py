"""Cases of `tritonmind bench kernels` that read or write the KV cache, in the model's type or in int8."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from tritonmind import kernels
from tritonmind_tools.bench.kernel_case import (
    BLOCK_SIZE,
    KV_SUFFIX,
    Case,
    Kernel,
    Point,
    Setting,
    block_tables,
    context_lens,
    indices,
    random,
)
from tritonmind_tools.bench.roofline import KV_SCALE_BYTES

MAX_POSITIONS = 4096  # rows of the rotary table; what is beyond costs nothing


def _kv_pools(setting: Setting, point: Point) -> tuple[torch.Tensor, torch.Tensor]:
    num_blocks = point.num_seqs * -(-point.context // BLOCK_SIZE)
    size = (num_blocks, setting.shape.num_kv_heads, BLOCK_SIZE, setting.shape.head_dim)
    return random(setting, *size), random(setting, *size)


class _Int8Pools(NamedTuple):
    """A layer's KV cache with a scale for each token and head."""

    k: torch.Tensor
    v: torch.Tensor
    scales: kernels.TokenScales


def _int8_pools(setting: Setting, point: Point) -> _Int8Pools:
    num_blocks = point.num_seqs * -(-point.context // BLOCK_SIZE)
    size = (num_blocks, setting.shape.num_kv_heads, BLOCK_SIZE, setting.shape.head_dim)
    k, v = (torch.randint(256, size, dtype=torch.uint8, device=setting.device) for _ in range(2))
    k_scales, v_scales = (torch.rand(size[:3], device=setting.device) / 100 for _ in range(2))
    return _Int8Pools(k, v, kernels.TokenScales(k_scales, v_scales))


def _pools(setting: Setting, point: Point, int8_kv: bool) -> tuple[torch.Tensor, torch.Tensor, kernels.KVScales | None]:
    return _int8_pools(setting, point) if int8_kv else (*_kv_pools(setting, point), None)


def _kv_bytes(setting: Setting, point: Point, int8_kv: bool = False) -> int:
    shape = setting.shape
    head_bytes = shape.head_dim + KV_SCALE_BYTES if int8_kv else shape.head_dim * setting.dtype.itemsize
    return point.num_seqs * point.context * 2 * shape.num_kv_heads * head_bytes


def _rotary_kv_write(setting: Setting, point: Point, *, int8_kv: bool = False) -> Case:
    shape = setting.shape
    # Large, little of it is touched: the sets share it.
    pools = functools.cache(lambda: _pools(setting, point, int8_kv))

    def make() -> Callable[[], object]:
        qkv = random(setting, point.num_tokens, shape.qkv_size)
        cos_sin = torch.randn(MAX_POSITIONS, shape.head_dim, device=setting.device)
        first = point.context - point.query_len
        positions = (indices(setting, point.num_tokens) % point.query_len + first).long()
        tables = block_tables(setting, point).repeat_interleave(point.query_len, dim=0)
        blocks = tables.gather(1, (positions // BLOCK_SIZE).unsqueeze(1)).squeeze(1)
        slot_mapping = (blocks * BLOCK_SIZE + positions % BLOCK_SIZE).to(torch.int32)
        positions %= MAX_POSITIONS
        k, v, scales = pools()
        return lambda: kernels.rotary_kv_write(
            qkv, cos_sin, positions, slot_mapping, k, v,
            num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, scales=scales,
        )  # fmt: skip

    angles = min(point.num_tokens, point.context) * shape.head_dim * 4
    q_size = shape.num_heads * shape.head_dim
    written = q_size * setting.dtype.itemsize + _kv_bytes(setting, Point(1, 1, 1), int8_kv)
    return Case(point.num_tokens * (shape.qkv_size * setting.dtype.itemsize + written) + angles, 0, make)


def _plan(setting: Setting, context_lens: torch.Tensor, int8_kv: bool = False) -> kernels.DecodePlan | None:
    shape = setting.shape
    return kernels.plan_decode(
        context_lens, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        block_size=BLOCK_SIZE, dtype=setting.dtype, int8_kv=int8_kv,
    )  # fmt: skip


def _plan_decode(setting: Setting, point: Point) -> Case:
    def make() -> Callable[[], object]:
        lengths = context_lens(setting, point)
        return lambda: _plan(setting, lengths)

    return Case(point.num_seqs * 4 * (1 + 4 + setting.shape.num_kv_heads), 0, make)


def _decode_attention(setting: Setting, point: Point, *, int8_kv: bool = False) -> Case:
    """One layer's; the plan is made once a step."""
    shape = setting.shape

    def make() -> Callable[[], object]:
        q = random(setting, point.num_seqs, shape.num_heads, shape.head_dim)
        (k, v, scales), tables = _pools(setting, point, int8_kv), block_tables(setting, point)
        lengths, scale = context_lens(setting, point), shape.head_dim**-0.5
        plan = _plan(setting, lengths, int8_kv)
        return lambda: kernels.paged_decode_attention(
            q, k, v, tables, lengths, softmax_scale=scale, scales=scales, plan=plan
        )

    q_bytes = point.num_seqs * shape.hidden_size * setting.dtype.itemsize
    num_flops = 4 * point.num_seqs * point.context * shape.hidden_size
    return Case(_kv_bytes(setting, point, int8_kv) + 2 * q_bytes, num_flops, make)


def _flat_pages(setting: Setting, point: Point, tables: torch.Tensor, starts: torch.Tensor) -> kernels.FlatPages | None:
    """The plan for prompts over int8 pages, with a scratch for all of them."""
    lens = [(point.query_len, point.context)] * point.num_seqs
    return kernels.plan_flat_pages(
        *_kv_pools(setting, point), tables, starts, context_lens(setting, point), lens=lens, num_tokens=point.num_tokens
    )


def _plan_flat_pages(setting: Setting, point: Point) -> Case:
    def make() -> Callable[[], object]:
        tables, scratch = block_tables(setting, point), _kv_pools(setting, point)
        starts, lengths = indices(setting, point.num_seqs + 1) * point.query_len, context_lens(setting, point)
        lens = [(point.query_len, point.context)] * point.num_seqs
        return lambda: kernels.plan_flat_pages(
            *scratch, tables, starts, lengths, lens=lens, num_tokens=point.num_tokens
        )

    return Case(point.num_seqs * 4 * (3 + 3 * -(-point.context // BLOCK_SIZE)), 0, make)


def _prefill_attention(setting: Setting, point: Point, *, int8_kv: bool = False) -> Case:
    """Over int8 pages with the copy of them, whose bytes are no part of what cannot be avoided."""
    shape, length = setting.shape, point.query_len

    def make() -> Callable[[], object]:
        q = random(setting, point.num_tokens, shape.num_heads, shape.head_dim)
        (k, v, scales), tables = _pools(setting, point, int8_kv), block_tables(setting, point)
        lengths, scale = context_lens(setting, point), shape.head_dim**-0.5
        starts = indices(setting, point.num_seqs + 1) * length
        flat = _flat_pages(setting, point, tables, starts) if int8_kv else None
        return lambda: kernels.paged_prefill_attention(
            q, k, v, tables, starts, lengths, max_query_len=length, softmax_scale=scale, scales=scales, flat=flat
        )

    q_bytes = point.num_tokens * shape.hidden_size * setting.dtype.itemsize
    # Query i sees the tokens before the run and i + 1 of it.
    num_pairs = point.num_seqs * (length * (point.context - length) + length * (length + 1) / 2)
    return Case(_kv_bytes(setting, point, int8_kv) + 2 * q_bytes, 4 * num_pairs * shape.hidden_size, make)


def _int8(case: Callable[..., Case]) -> Callable[[Setting, Point], Case]:
    """The case over an int8 KV cache."""
    return functools.partial(case, int8_kv=True)


CACHE_KERNELS = (
    Kernel("rotary_kv_write", "rotary_kv_write", True, True, _rotary_kv_write),
    Kernel("plan_decode", "plan_decode", True, False, _plan_decode),
    Kernel("paged_decode_attention", "paged_decode_attention", True, False, _decode_attention),
    Kernel("paged_prefill_attention", "paged_prefill_attention", False, True, _prefill_attention),
    Kernel("rotary_kv_write" + KV_SUFFIX, "rotary_kv_write", True, True, _int8(_rotary_kv_write)),
    Kernel("paged_decode_attention" + KV_SUFFIX, "paged_decode_attention", True, False, _int8(_decode_attention)),
    Kernel("plan_flat_pages", "plan_flat_pages", False, True, _plan_flat_pages),
    Kernel("paged_prefill_attention" + KV_SUFFIX, "paged_prefill_attention", False, True, _int8(_prefill_attention)),
)
