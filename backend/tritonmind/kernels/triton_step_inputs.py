"""The kernels behind step_inputs.py. A step has one of each, in front of the model."""

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
    do_not_specialize=["num_tokens", "max_blocks"],
    do_not_specialize_on_alignment=["token_ids_ptr", "positions_ptr", "slots_ptr"],
)
def _prepare_tokens_kernel(
    token_ids_ptr,  # [num_tokens]
    positions_ptr,  # [num_tokens]
    slots_ptr,  # [num_tokens]
    last_token_ids_ptr,  # [S]
    block_tables_ptr,  # [S, max_blocks]
    max_blocks,
    out_token_ids_ptr,  # [num_tokens]
    out_positions_ptr,  # [num_tokens]
    out_slot_mapping_ptr,  # [num_tokens]
    num_tokens,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    position = tl.load(positions_ptr + token, mask=inside, other=-1)
    real = position >= 0
    slot = tl.load(slots_ptr + token, mask=real, other=0).to(tl.int64)
    token_id = tl.load(token_ids_ptr + token, mask=real, other=0).to(tl.int64)
    last = tl.load(last_token_ids_ptr + slot, mask=real & (token_id < 0), other=0)
    tl.store(out_token_ids_ptr + token, tl.where(token_id < 0, last, token_id), mask=inside)
    tl.store(out_positions_ptr + token, tl.maximum(position, 0).to(tl.int64), mask=inside)
    block = tl.load(block_tables_ptr + slot * max_blocks + position // BLOCK_SIZE, mask=real, other=0)
    cache_slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(out_slot_mapping_ptr + token, tl.where(real, cache_slot, -1), mask=inside)


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
    out_token_ids: torch.Tensor,
    out_positions: torch.Tensor,
    out_slot_mapping: torch.Tensor,
) -> None:
    """Launch on checked arguments; see step_inputs.prepare_tokens."""
    num_tokens = len(token_ids)
    if num_tokens:
        _prepare_tokens_kernel[(triton.cdiv(num_tokens, BLOCK),)](
            token_ids, positions, slots, last_token_ids, block_tables, block_tables.shape[1],
            out_token_ids, out_positions, out_slot_mapping, num_tokens,
            BLOCK_SIZE=block_size, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
