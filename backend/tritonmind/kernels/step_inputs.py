"""The inputs of a step that only the device knows: last sampled tokens, and cache slots out of the block tables.

A step of decodes only is completed by `prepare_decodes`, one kernel whose arguments a graph can hold. Any other one
takes two, `write_block_tables` and `prepare_tokens`.

rope_limits: where rotary frequencies depend on a sequence's length, the lengths beyond which there are others, [n]
int32, ascending; see layers/rotary.py. A sequence that is longer than k of them has its positions behind the first k
tables, each of which has as many rows as its limit.
"""

from typing import NamedTuple

import torch

from tritonmind.kernels.dispatch import check_ndim, check_tensor, use_triton


class TokenInputs(NamedTuple):
    """What the model takes for each token of a step."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, rows of the rotary table
    slot_mapping: torch.Tensor  # [T] int32, -1 writes no K and V


class DecodeInputs(NamedTuple):
    """What the model takes for each row of a step of decodes only."""

    tokens: TokenInputs  # of [R]
    block_tables: torch.Tensor  # [R, max_blocks] int32, by row; past a row's pages anything may stand


def write_block_tables(block_tables: torch.Tensor, indices: torch.Tensor, blocks: torch.Tensor) -> None:
    """block_tables.flatten()[indices] = blocks, in place.

    block_tables: [S, max_blocks] int32, contiguous. indices, blocks: [N] int32, no index twice; they are trusted to be
    in range on a GPU. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    device = block_tables.device
    check_ndim("block_tables", block_tables, 2)
    check_tensor("block_tables", block_tables, tuple(block_tables.shape), torch.int32, device)
    check_ndim("indices", indices, 1)
    check_tensor("indices", indices, tuple(indices.shape), torch.int32, device)
    check_tensor("blocks", blocks, tuple(indices.shape), torch.int32, device)
    if not use_triton(block_tables):
        block_tables.view(-1)[indices.long()] = blocks
        return
    from tritonmind.kernels import triton_step_inputs

    triton_step_inputs.write_block_tables(block_tables, indices, blocks)


def prepare_tokens(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    last_token_ids: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    block_size: int,
    rope_limits: torch.Tensor | None = None,
    out: TokenInputs,
) -> TokenInputs:
    """Complete a step's tokens on the device.

    token_ids: [T] int32, -1 stands for the last token sampled in the token's slot. positions: [T] int32, -1 marks
    padding, which becomes token 0 at position 0 and writes nothing. slots: [T] int32, rows of the next two; with
    rope_limits plus S times the number of limits that the token's sequence exceeds. last_token_ids: [S] int64.
    block_tables: [S, max_blocks] int32. out: tensors of [T]. Returns out. Raises ValueError for a wrong shape, dtype,
    device or layout.
    """
    device = token_ids.device
    check_ndim("token_ids", token_ids, 1)
    shape = tuple(token_ids.shape)
    for name, tensor, dtype in (
        ("token_ids", token_ids, torch.int32),
        ("positions", positions, torch.int32),
        ("slots", slots, torch.int32),
        ("out.token_ids", out.token_ids, torch.int64),
        ("out.positions", out.positions, torch.int64),
        ("out.slot_mapping", out.slot_mapping, torch.int32),
    ):
        check_tensor(name, tensor, shape, dtype, device)
    check_ndim("block_tables", block_tables, 2)
    check_tensor("block_tables", block_tables, tuple(block_tables.shape), torch.int32, device)
    check_tensor("last_token_ids", last_token_ids, (block_tables.shape[0],), torch.int64, device)
    _check_limits(rope_limits, device)
    if use_triton(token_ids):
        from tritonmind.kernels import triton_step_inputs

        triton_step_inputs.prepare_tokens(
            token_ids, positions, slots, last_token_ids, block_tables, block_size, rope_limits, *out
        )
        return out
    real = positions >= 0
    slot = slots.long()
    position = positions.clamp(min=0).long()
    row = position
    if rope_limits is not None:
        starts = torch.cat((rope_limits.new_zeros(1), rope_limits.cumsum(0)))
        slot, row = slot % len(last_token_ids), position + starts[slot // len(last_token_ids)]
    out.token_ids.copy_(torch.where(token_ids < 0, last_token_ids[slot], token_ids.long()).where(real, 0))
    out.positions.copy_(row)
    blocks = block_tables[slot, position // block_size]
    out.slot_mapping.copy_((blocks * block_size + position % block_size).where(real, -1))
    return out


def prepare_decodes(
    token_ids: torch.Tensor,
    context_lens: torch.Tensor,
    slots: torch.Tensor,
    new_blocks: torch.Tensor,
    last_token_ids: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    block_size: int,
    rope_limits: torch.Tensor | None = None,
    out: DecodeInputs,
) -> DecodeInputs:
    """Complete a step of decodes only: one token a row, the last one of its context, and rows of their own slots.

    token_ids: [R] int32, -1 stands for the last token sampled in the row's slot. context_lens: [R] int32, the token
    included; 0 marks padding, which becomes token 0 at position 0, writes nothing and gets no block table. slots: [R]
    int32, rows of the last two, each at most once; not read for padding. new_blocks: [R] int32, a block that enters
    block_tables for the token's page, or -1. last_token_ids: [S] int64. block_tables: [S, max_blocks] int32, changed
    in place. out: tensors of [R]. Returns out. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    device = token_ids.device
    check_ndim("token_ids", token_ids, 1)
    check_ndim("block_tables", block_tables, 2)
    num_rows, (num_slots, max_blocks) = len(token_ids), block_tables.shape
    for name, tensor, dtype in (
        ("token_ids", token_ids, torch.int32),
        ("context_lens", context_lens, torch.int32),
        ("slots", slots, torch.int32),
        ("new_blocks", new_blocks, torch.int32),
        ("out.tokens.token_ids", out.tokens.token_ids, torch.int64),
        ("out.tokens.positions", out.tokens.positions, torch.int64),
        ("out.tokens.slot_mapping", out.tokens.slot_mapping, torch.int32),
    ):
        check_tensor(name, tensor, (num_rows,), dtype, device)
    check_tensor("last_token_ids", last_token_ids, (num_slots,), torch.int64, device)
    check_tensor("block_tables", block_tables, (num_slots, max_blocks), torch.int32, device)
    check_tensor("out.block_tables", out.block_tables, (num_rows, max_blocks), torch.int32, device)
    _check_limits(rope_limits, device)
    if use_triton(token_ids):
        from tritonmind.kernels import triton_step_inputs

        triton_step_inputs.prepare_decodes(
            token_ids, context_lens, slots, new_blocks, last_token_ids, block_tables, block_size, rope_limits,
            *out.tokens, out.block_tables,
        )  # fmt: skip
        return out
    real = context_lens > 0
    slot, position = slots.where(real, 0).long(), (context_lens - 1).clamp(min=0).long()
    column = position // block_size
    new = real & (new_blocks >= 0)
    block_tables[slot[new], column[new]] = new_blocks[new]
    out.block_tables[real] = block_tables[slot[real]]
    out.tokens.token_ids.copy_(torch.where(token_ids < 0, last_token_ids[slot], token_ids.long()).where(real, 0))
    out.tokens.positions.copy_(position)
    if rope_limits is not None:
        out.tokens.positions.add_(((context_lens.unsqueeze(1) > rope_limits) * rope_limits).sum(1))
    cache_slots = block_tables[slot, column] * block_size + position % block_size
    out.tokens.slot_mapping.copy_(cache_slots.where(real, -1))
    return out


def _check_limits(rope_limits: torch.Tensor | None, device: torch.device) -> None:
    if rope_limits is not None:
        check_ndim("rope_limits", rope_limits, 1)
        check_tensor("rope_limits", rope_limits, tuple(rope_limits.shape), torch.int32, device)
