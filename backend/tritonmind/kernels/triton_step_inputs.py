"""The kernels behind step_inputs.py, in front of the model.

None is launched with PDL: each reads what the host has sent, and the copy that brought it must have ended.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

BLOCK = 128


# The staged arrays begin anywhere: without this, a change of length or alignment would compile while serving.
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["indices_ptr", "blocks_ptr"])
def _write_block_tables_kernel(
    block_tables_ptr,  # [S * max_blocks]
    indices_ptr,  # [count]
    blocks_ptr,  # [count]
    count,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    index = tl.load(indices_ptr + entry, mask=inside, other=0)
    tl.store(block_tables_ptr + index, tl.load(blocks_ptr + entry, mask=inside, other=0), mask=inside)


@triton.jit(
    do_not_specialize=["num_tokens", "max_blocks", "num_slots"],
    do_not_specialize_on_alignment=["token_ids_ptr", "positions_ptr", "slots_ptr"],
)
def _prepare_tokens_kernel(
    token_ids_ptr,  # [num_tokens]
    positions_ptr,  # [num_tokens]
    slots_ptr,  # [num_tokens]
    last_token_ids_ptr,  # [S]
    block_tables_ptr,  # [S, max_blocks]
    max_blocks,
    rope_limits_ptr,  # [NUM_LIMITS]
    num_slots,  # S
    out_token_ids_ptr,  # [num_tokens]
    out_positions_ptr,  # [num_tokens]
    out_slot_mapping_ptr,  # [num_tokens]
    num_tokens,
    BLOCK_SIZE: tl.constexpr,
    NUM_LIMITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    position = tl.load(positions_ptr + token, mask=inside, other=-1)
    real = position >= 0
    slot = tl.load(slots_ptr + token, mask=real, other=0).to(tl.int64)
    row = tl.maximum(position, 0).to(tl.int64)
    if NUM_LIMITS:
        num_exceeded = slot // num_slots
        slot = slot % num_slots
        for number in tl.static_range(NUM_LIMITS):
            row += tl.where(number < num_exceeded, tl.load(rope_limits_ptr + number), 0)
    token_id = tl.load(token_ids_ptr + token, mask=real, other=0).to(tl.int64)
    last = tl.load(last_token_ids_ptr + slot, mask=real & (token_id < 0), other=0)
    tl.store(out_token_ids_ptr + token, tl.where(token_id < 0, last, token_id), mask=inside)
    tl.store(out_positions_ptr + token, row, mask=inside)
    block = tl.load(block_tables_ptr + slot * max_blocks + position // BLOCK_SIZE, mask=real, other=0)
    cache_slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(out_slot_mapping_ptr + token, tl.where(real, cache_slot, -1), mask=inside)


@triton.jit(do_not_specialize=["max_blocks"])
def _prepare_decodes_kernel(
    token_ids_ptr,  # [R], as all without a shape
    context_lens_ptr,
    slots_ptr,
    new_blocks_ptr,
    last_token_ids_ptr,  # [S]
    block_tables_ptr,  # [S, max_blocks]
    max_blocks,
    rope_limits_ptr,  # [NUM_LIMITS]
    out_token_ids_ptr,
    out_positions_ptr,
    out_slot_mapping_ptr,
    out_block_tables_ptr,  # [R, max_blocks]
    BLOCK_SIZE: tl.constexpr,
    NUM_LIMITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program has its slot's table to itself: the new block goes there and on from registers, unseen by others.
    row = tl.program_id(0).to(tl.int64)
    context_len = tl.load(context_lens_ptr + row)
    real = context_len > 0
    slot = tl.load(slots_ptr + row, mask=real, other=0).to(tl.int64)
    new_block = tl.load(new_blocks_ptr + row, mask=real, other=-1)
    has_new = new_block >= 0
    position = tl.maximum(context_len - 1, 0)
    page = position // BLOCK_SIZE
    table_ptr = block_tables_ptr + slot * max_blocks
    block = tl.where(has_new, new_block, tl.load(table_ptr + page, mask=real, other=0))
    cache_slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(out_slot_mapping_ptr + row, tl.where(real, cache_slot, -1))
    table_row = position.to(tl.int64)
    for number in tl.static_range(NUM_LIMITS):
        limit = tl.load(rope_limits_ptr + number)
        table_row += tl.where(context_len > limit, limit, 0)
    tl.store(out_positions_ptr + row, table_row)
    token_id = tl.load(token_ids_ptr + row, mask=real, other=0).to(tl.int64)
    last = tl.load(last_token_ids_ptr + slot, mask=real & (token_id < 0), other=0)
    tl.store(out_token_ids_ptr + row, tl.where(token_id < 0, last, token_id))
    for start in range(0, tl.where(real, page + 1, 0), BLOCK):
        column = start + tl.arange(0, BLOCK)
        blocks = tl.load(table_ptr + column, mask=column < page, other=0)
        blocks = tl.where(column == page, block, blocks)
        tl.store(out_block_tables_ptr + row * max_blocks + column, blocks, mask=column <= page)
    tl.store(table_ptr + page, new_block, mask=has_new)


def write_block_tables(block_tables: torch.Tensor, indices: torch.Tensor, blocks: torch.Tensor) -> None:
    """Launch on checked arguments; see step_inputs.write_block_tables."""
    count = len(indices)
    if count:
        _write_block_tables_kernel[(triton.cdiv(count, BLOCK),)](
            block_tables, indices, blocks, count, BLOCK=BLOCK, num_warps=4
        )


def prepare_tokens(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    last_token_ids: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    rope_limits: torch.Tensor | None,
    out_token_ids: torch.Tensor,
    out_positions: torch.Tensor,
    out_slot_mapping: torch.Tensor,
) -> None:
    """Launch on checked arguments; see step_inputs.prepare_tokens."""
    num_tokens = len(token_ids)
    if num_tokens:
        _prepare_tokens_kernel[(triton.cdiv(num_tokens, BLOCK),)](
            token_ids, positions, slots, last_token_ids, block_tables, block_tables.shape[1], rope_limits,
            len(block_tables), out_token_ids, out_positions, out_slot_mapping, num_tokens,
            BLOCK_SIZE=block_size, NUM_LIMITS=_count(rope_limits), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def _count(rope_limits: torch.Tensor | None) -> int:
    return 0 if rope_limits is None else len(rope_limits)


def prepare_decodes(
    token_ids: torch.Tensor,
    context_lens: torch.Tensor,
    slots: torch.Tensor,
    new_blocks: torch.Tensor,
    last_token_ids: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    rope_limits: torch.Tensor | None,
    out_token_ids: torch.Tensor,
    out_positions: torch.Tensor,
    out_slot_mapping: torch.Tensor,
    out_block_tables: torch.Tensor,
) -> None:
    """Launch on checked arguments; see step_inputs.prepare_decodes."""
    num_rows = len(token_ids)
    if num_rows:
        _prepare_decodes_kernel[(num_rows,)](
            token_ids, context_lens, slots, new_blocks, last_token_ids, block_tables, block_tables.shape[1],
            rope_limits, out_token_ids, out_positions, out_slot_mapping, out_block_tables,
            BLOCK_SIZE=block_size, NUM_LIMITS=_count(rope_limits), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
