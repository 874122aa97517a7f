"""The launches whose kernels must compile: each launcher with the sizes of Llama 2 and 3, each tile that is shipped."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator

import torch

from tritonmind.kernels import (
    SamplingState,
    gluon_linear,
    gluon_w4_linear,
    mask_words,
    triton_activation,
    triton_decode_attention,
    triton_decode_plan,
    triton_flat_pages,
    triton_gather,
    triton_int8_linear,
    triton_linear,
    triton_logit_edits,
    triton_logprobs,
    triton_norm,
    triton_prefill_attention,
    triton_rotary,
    triton_sampling,
    triton_step_inputs,
    triton_token_mask,
    triton_w4_linear,
    tuning,
    w4_layout,
)
from tritonmind.kernels.flat_pages import FlatPages
from tritonmind.kernels.head_norms import HeadNorms
from tritonmind.kernels.int8_layout import Int8Weight
from tritonmind.kernels.kv_quant import KVScales, LayerScales, TokenScales
from tritonmind.kernels.tile_table import KERNELS, Card, Tile, takes_many_rows

# One card for each architecture that is compiled for, known to no file of tiles, so that it has the rules'.
ARCHITECTURES = (Card("sm_80", (8, 0), 108), Card("sm_89", (8, 9), 128), Card("sm_90", (9, 0), 132))
# Of the cards that there are files for: the architecture.
CAPABILITIES = {"NVIDIA H100": (9, 0), "NVIDIA H200": (9, 0), "NVIDIA A100": (8, 0), "NVIDIA GeForce RTX 4090": (8, 9)}
DEVICE = torch.device("cpu")
NUM_SEQS, HIDDEN, NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_SIZE = 4, 4096, 8, 4, 128, 64
NUM_HEADS = NUM_KV_HEADS * GROUP
VOCAB_SIZES = (32000, 128256)
MAX_ROWS = 2048
WINDOW = 4096  # Mistral's
# Of Llama-2-7B and Llama-3-8B, in the order of tile_table.KERNELS; the one that a quick run compiles comes first.
SIZES = {
    "linear": [(4096, 4096), (12288, 4096), (4096, 11008)],
    "gate_up": [(11008, 4096)],
    "w4_linear": [(4096, 4096, 128), (960, 576, 64), (12288, 4096, 32)],
    "w4_gate_up": [(11008, 4096, 128), (1536, 576, 64)],
    "int8_linear": [(32000, 4096), (49152, 576)],
    "decode_attention": [
        (128, 4, 64, 2),
        (128, 1, 64, 1),
        (128, 1, 64, 2),
        (128, 4, 64, 1),
        (64, 3, 16, 2),
        (96, 1, 16, 1),
        (8, 2, 64, 2),
    ],
    "prefill_attention": [(128, 4, 64, 2), (64, 3, 16, 2), (8, 2, 64, 2)],
}
LAYER_SCALES = LayerScales(0.1, 0.2, 0.3, 0.4)
# What no rule asks for, but a file may.
EXTRA_TILES = {
    "linear": [Tile(block_m=64, block_n=128, block_k=64, splits=3, prefetch=1, num_warps=8, num_stages=3)],
    "gate_up": [Tile(block_m=16, block_n=64, block_k=64, prefetch=1, num_warps=4, num_stages=4)],
    # Scales on the weight.
    "w4_linear": [
        Tile(block_m=16, block_n=64, slices=2, splits=4, prefetch=8, num_warps=4, num_stages=4),
        Tile(block_m=128, block_n=128, splits=2, prefetch=4, num_warps=8, num_stages=3),
    ],
    "w4_gate_up": [Tile(block_m=64, block_n=128, prefetch=1, num_warps=8, num_stages=3)],
}

Case = tuple[str, Callable[[], object]]


def target_cards() -> list[Card]:
    """One of each architecture, and those that tiles are shipped for."""
    cards = list(ARCHITECTURES)
    for path in sorted(tuning.SHIPPED.glob("*.json")):
        name = json.loads(path.read_text())["card"]
        known = [capability for start, capability in CAPABILITIES.items() if name.startswith(start)]
        assert known, f"{path.name}: which architecture is {name}? Say it in CAPABILITIES"
        (alike,) = (card for card in ARCHITECTURES if card.capability == known[0])
        cards.append(alike._replace(name=name))
    return cards


def cases(card: Card) -> Iterator[Case]:
    """A label and a launch each; of a kernel's cases the most telling one first."""
    yield from _tiled(card)
    if card not in ARCHITECTURES:
        return
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        if takes_many_rows(card, {"n": HIDDEN, "k": HIDDEN}):
            yield f"{name} MANY_ROWS", functools.partial(_many_rows, dtype)
        for splits in (4, 1):
            yield f"{name} SPLITS {splits}", functools.partial(_layer, dtype, splits)
        for vocab_size in VOCAB_SIZES if dtype == torch.float16 else VOCAB_SIZES[:1]:
            for greedy in (False, True):
                label = f"{name} VOCAB {vocab_size} GREEDY {greedy}"
                yield label, functools.partial(_sampling, dtype, vocab_size, greedy)
    yield "int32", _step_inputs


def _tiled(card: Card) -> Iterator[Case]:
    """Every tile that dispatch can pick, once; at further sizes the first and the last that are picked there.

    The type matters little to the code: bf16 at one size of an architecture's, and with a bias.
    """
    launches = {
        "linear": _linear,
        "gate_up": _gate_up,
        "w4_linear": _w4_linear,
        "w4_gate_up": _w4_gate_up,
        "int8_linear": _int8_linear,
        "decode_attention": _decode,
        "prefill_attention": _prefill,
    }
    for kernel, spec in KERNELS.items():
        seen: set[Tile] = set()
        listed = sorted(tuning.listed(kernel, card))
        for index, sizes in enumerate(listed if card not in ARCHITECTURES else SIZES[kernel]):
            named = dict(zip(spec.sizes, sizes, strict=True))
            picked = tuning.variants(kernel, DEVICE, max_rows=MAX_ROWS, **named)
            picked += [(tile.block_m, tile) for tile in EXTRA_TILES.get(kernel, ()) if index == 0]
            for number, (rows, tile) in enumerate(picked):
                # Parts are stored as the sums are, but for those of warp groups.
                apart_from_splits = tile if tile.warp_groups else tile._replace(splits=1)
                if tile.is_whole or (apart_from_splits in seen and 0 < number < len(picked) - 1):
                    continue
                seen.add(apart_from_splits)
                for dtype in (torch.float16, torch.bfloat16)[: 2 if index == 0 and card in ARCHITECTURES else 1]:
                    label = " ".join([str(dtype).removeprefix("torch."), *(f"{n}={s}" for n, s in named.items())])
                    yield f"{label} rows={rows}", functools.partial(launches[kernel], named, dtype, rows, tile)


def _linear(sizes: dict[str, int], dtype: torch.dtype, rows: int, tile: Tile) -> None:
    n, k = sizes["n"], sizes["k"]
    x, weight = torch.empty(rows, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
    whole = torch.empty(rows, n, dtype=dtype)
    parts = torch.empty(tile.splits, rows, n) if tile.splits > 1 else whole
    triton_linear.linear(x, weight, None, parts, tile)
    if dtype == torch.bfloat16:
        triton_linear.linear(x, weight, weight[:, 0].contiguous(), whole, tile._replace(splits=1))


def _gate_up(sizes: dict[str, int], dtype: torch.dtype, rows: int, tile: Tile) -> None:
    n, k = sizes["n"], sizes["k"]
    x, weight = torch.empty(rows, k, dtype=dtype), torch.empty(2 * n, k, dtype=dtype)
    triton_linear.gate_up(x, weight, torch.empty(rows, n, dtype=dtype), tile)


def _many_rows(dtype: torch.dtype) -> None:
    x, weight = torch.empty(MAX_ROWS, HIDDEN, dtype=dtype), torch.empty(HIDDEN, HIDDEN, dtype=dtype)
    gluon_linear.gate_up(x, weight, torch.empty(MAX_ROWS, HIDDEN // 2, dtype=dtype))


def _packed(n: int, sizes: dict[str, int], dtype: torch.dtype, *, gated: bool) -> w4_layout.PackedWeight:
    k, group_size = sizes["k"], sizes["group_size"]
    rows, columns = -(-n // w4_layout.BLOCK_ROWS), -(-k // w4_layout.BLOCK_K)
    words = torch.zeros(rows, columns, w4_layout.BLOCK_ROWS, w4_layout.WORDS, dtype=torch.int32)
    params = torch.zeros(rows, columns, w4_layout.BLOCK_K // group_size, w4_layout.BLOCK_ROWS, dtype=torch.int32)
    return w4_layout.PackedWeight(words, params, n, k, group_size, dtype, gated)


def _w4_linear(sizes: dict[str, int], dtype: torch.dtype, rows: int, tile: Tile) -> None:
    n = sizes["n"]
    weight, x = _packed(n, sizes, dtype, gated=False), torch.empty(rows, sizes["k"], dtype=dtype)
    whole = torch.empty(rows, n, dtype=dtype)
    parts = torch.empty(tile.splits, rows, n) if tile.splits > 1 else whole
    if tile.warp_groups:
        gluon_w4_linear.multiply(x, weight, None, parts, tile)
        if tile.splits == 1:
            gluon_w4_linear.multiply(x, weight, None, whole, tile, add=True)
        if dtype == torch.bfloat16:
            gluon_w4_linear.multiply(x, weight, torch.empty(n, dtype=dtype), parts, tile)
        return
    triton_w4_linear.linear(x, weight, None, parts, tile)
    triton_w4_linear.dequantize(weight, torch.empty(n, sizes["k"], dtype=dtype))
    if dtype == torch.bfloat16 and tile.block_m <= 16:
        triton_w4_linear.linear(x, weight, torch.empty(n, dtype=dtype), whole, tile._replace(splits=1))


def _w4_gate_up(sizes: dict[str, int], dtype: torch.dtype, rows: int, tile: Tile) -> None:
    n = sizes["n"]
    weight, x = _packed(2 * n, sizes, dtype, gated=True), torch.empty(rows, sizes["k"], dtype=dtype)
    if tile.warp_groups:
        gluon_w4_linear.multiply(x, weight, None, torch.empty(rows, n, dtype=dtype), tile)
        return
    triton_w4_linear.gate_up(x, weight, torch.empty(rows, n, dtype=dtype), tile)
    triton_w4_linear.dequantize(weight, torch.empty(2 * n, sizes["k"], dtype=dtype))


def _int8_linear(sizes: dict[str, int], dtype: torch.dtype, rows: int, tile: Tile) -> None:
    n, k = sizes["n"], sizes["k"]
    words = torch.zeros(-(-n // 32), -(-k // 64), 32, 16, dtype=torch.int32)
    weight = Int8Weight(words, torch.empty(n), n, k)
    triton_int8_linear.linear(torch.empty(rows, k, dtype=dtype), weight, torch.empty(rows, n, dtype=dtype), tile)


def _decode(sizes: dict[str, int], dtype: torch.dtype, rows: int, tile: Tile) -> None:
    """The launchers ask for the tile themselves, here as in _prefill. One sequence has many pieces, many have few."""
    group, head_dim, block_size, itemsize = (sizes[name] for name in ("group", "head_dim", "block_size", "itemsize"))
    num_heads = NUM_KV_HEADS * group
    pool = _pool(sizes, torch.uint8 if itemsize == 1 else dtype)
    kinds: list[KVScales | None] = [None] if itemsize > 1 else [_token_scales(pool)]
    if itemsize == 1 and head_dim == HEAD_DIM:
        kinds.append(LAYER_SCALES)
    for num_seqs in (1, rows):
        plan, windowed = (
            triton_decode_plan.plan_decode(
                _ints(num_seqs), num_heads, NUM_KV_HEADS, head_dim, block_size, itemsize, window, 0
            )
            for window in (0, WINDOW)
        )
        q, tables = torch.empty(num_seqs, num_heads, head_dim, dtype=dtype), _ints(2 * num_seqs).view(num_seqs, 2)
        for scales in kinds:
            triton_decode_attention.paged_decode_attention(q, pool, pool, tables, plan, 0.1, 0, scales, q)
            if head_dim == HEAD_DIM and rows == num_seqs:
                triton_decode_attention.paged_decode_attention(q, pool, pool, tables, windowed, 0.1, WINDOW, scales, q)


def _prefill(sizes: dict[str, int], dtype: torch.dtype, rows: int, tile: Tile) -> None:
    q, pool = torch.empty(NUM_SEQS, NUM_KV_HEADS * sizes["group"], sizes["head_dim"], dtype=dtype), _pool(sizes, dtype)
    tables, starts = _ints(2 * NUM_SEQS).view(NUM_SEQS, 2), _ints(NUM_SEQS + 1)
    for window in (0, WINDOW) if sizes["head_dim"] == HEAD_DIM else (0,):
        triton_prefill_attention.paged_prefill_attention(
            q, pool, pool, tables, starts, _ints(NUM_SEQS), rows, 0.1, window, q
        )


def _layer(dtype: torch.dtype, splits: int) -> None:
    """What stands between the products, and takes their partial sums."""
    hidden, q = torch.empty(NUM_SEQS, HIDDEN, dtype=dtype), torch.empty(NUM_SEQS, NUM_HEADS, HEAD_DIM, dtype=dtype)
    qkv_size = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    if splits == 1:
        x, qkv = hidden, torch.empty(NUM_SEQS, qkv_size, dtype=dtype)
        triton_norm.rms_norm(x, None, hidden[0], 1e-5, hidden)
    else:
        x, qkv = torch.empty(splits, NUM_SEQS, HIDDEN), torch.empty(splits, NUM_SEQS, qkv_size)
    triton_norm.rms_norm(x, hidden, hidden[0], 1e-5, hidden)
    pool, ints = _pool({"block_size": BLOCK_SIZE, "head_dim": HEAD_DIM}, dtype), _ints(NUM_SEQS)
    pages = _pool({"block_size": BLOCK_SIZE, "head_dim": HEAD_DIM}, torch.uint8)
    triton_flat_pages.plan_group(_ints(8).view(4, 2), _ints(5), ints, ints, BLOCK_SIZE, 8, True)
    for scales in (None, _token_scales(pages), LAYER_SCALES):
        cache = pool if scales is None else pages
        for flat in (None,) if scales is None else (None, FlatPages(pool, pool, [], ints)):
            angles = torch.empty(16, HEAD_DIM)
            rotary = functools.partial(triton_rotary.rotary_kv_write, qkv, angles, ints.long(), ints, cache, cache)
            rotary(None, None, scales, flat, q)
            rotary(HeadNorms(hidden[0, :HEAD_DIM], hidden[1, :HEAD_DIM], 1e-6), angles[:, 0], scales, flat, q)
        if scales is not None:
            triton_flat_pages.flatten_pages(pages, pages, scales, ints, ints, ints, pool, pool)
    triton_activation.silu_mul(torch.empty(NUM_SEQS, 2 * HIDDEN, dtype=dtype), hidden)
    triton_gather.gather_rows(hidden, ints.long(), hidden)


def _sampling(dtype: torch.dtype, vocab_size: int, greedy: bool) -> None:
    ids, slots, values = _ints(NUM_SEQS).long(), _ints(NUM_SEQS), torch.empty(NUM_SEQS)
    logits = torch.empty(NUM_SEQS, vocab_size, dtype=dtype)
    counts = torch.zeros(NUM_SEQS, vocab_size, dtype=torch.int32)
    state = SamplingState(values, slots, values, values, values, values, values, ids, counts)
    triton_sampling.sample_tokens(logits, slots, slots, state, greedy, ids, ids)
    triton_logit_edits.edit_logits(logits, slots, slots, values, slots, slots, ids)
    triton_logprobs.token_logprobs(logits, ids)
    triton_token_mask.mask_tokens(logits, slots, torch.zeros(NUM_SEQS, mask_words(vocab_size), dtype=torch.int32))


def _step_inputs() -> None:
    """No floating-point type is in these."""
    ints, tables = _ints(8), _ints(8).view(4, 2)
    longs, rows = ints.long(), ints[:4]
    triton_step_inputs.write_block_tables(tables, ints, ints)
    for limits in (None, ints[:2]):
        triton_step_inputs.prepare_tokens(ints, ints, ints, longs, tables, BLOCK_SIZE, limits, longs, longs, ints)
        triton_step_inputs.prepare_decodes(
            rows, rows, rows, rows, longs, tables, BLOCK_SIZE, limits, longs[:4], longs[:4], rows, tables.clone()
        )


def _pool(sizes: dict[str, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(8, NUM_KV_HEADS, sizes["block_size"], sizes["head_dim"], dtype=dtype)


def _token_scales(pool: torch.Tensor) -> TokenScales:
    return TokenScales(*(torch.empty(pool.shape[:3]) for _ in range(2)))


def _ints(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)
