"""Int8 pages of prompts as floating-point pages, for one layer at a time: what prefill attention reads on a GPU.

Each tile of queries would turn the same bytes into numbers again. So the pages of a step's prompts are written out once
a layer, one after the other into a scratch, and the kernels for floating-point pages attend over that. Attention sees
what is stored, of a step's own tokens too: a result does not depend on how a prompt was cut into chunks.

The kernel that writes new tokens to the cache can write what was stored to the scratch as well; then only pages of
earlier tokens are copied. Prompts whose pages do not fit the scratch together go in groups, and are copied whole. A
plan of all this is made once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tritonmind.kernels.dispatch import check_block_tables, check_kv_pools, check_tensor, use_triton


class PromptGroup(NamedTuple):
    """Some of a step's prompts one after the other, whose queries are the step's from first_token to end_token.

    Page pages[i] of the scratch is to be a copy of blocks[i]. The other tensors are the arguments of
    paged_prefill_attention for the group alone, with the pages of the scratch.
    """

    first_token: int
    end_token: int
    max_query_len: int
    blocks: torch.Tensor  # [num_copies] int32
    pages: torch.Tensor  # [num_copies] int32
    block_tables: torch.Tensor  # [S, max_blocks] int32
    cu_seqlens_q: torch.Tensor  # [S + 1] int32
    context_lens: torch.Tensor  # [S] int32


class FlatPages(NamedTuple):
    """A scratch of pages, [capacity, num_kv_heads, block_size, head_dim] each, and the groups that go through it.

    slots: [T] int32, where in the scratch rotary_kv_write puts each of the prompts' new tokens, page * block_size +
    offset; -1 nowhere.
    """

    k: torch.Tensor
    v: torch.Tensor
    groups: list[PromptGroup]
    slots: torch.Tensor


def plan_flat_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    lens: Sequence[tuple[int, int]],
    written: bool = False,
) -> FlatPages | None:
    """Groups of prompts for the scratch k, v, once a step for all layers; None on a CPU, which needs none.

    The other tensors are those that paged_prefill_attention gets, on the device. lens: query_len and context_len of
    each sequence, as the host knows them. written: rotary_kv_write gets the plan too. Raises ValueError for a wrong
    shape, dtype or device, or a sequence that does not fit the scratch.
    """
    check_kv_pools(k, v, k.dtype, block_tables.device)
    capacity, _, block_size, _ = k.shape
    check_block_tables(block_tables, len(lens), k.device)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (len(lens) + 1,), torch.int32, k.device)
    check_tensor("context_lens", context_lens, (len(lens),), torch.int32, k.device)
    if not use_triton(k):
        return None
    from tritonmind.kernels import triton_flat_pages

    ranges = _groups([-(-context_len // block_size) for _, context_len in lens], capacity)
    written = written and len(ranges) == 1
    slots = torch.empty(sum(query_len for query_len, _ in lens), dtype=torch.int32, device=k.device)
    groups = []
    first_token = 0
    for first, end in ranges:
        chosen, lengths = lens[first:end], context_lens[first:end]
        num_copies = sum(-(-(context - query * written) // block_size) for query, context in chosen)
        blocks, pages, tables, starts = triton_flat_pages.plan_group(
            block_tables[first:end], cu_seqlens_q[first : end + 1], lengths, slots, block_size, num_copies, written
        )
        end_token = first_token + sum(query_len for query_len, _ in chosen)
        longest = max(1, *(query_len for query_len, _ in chosen), 1)
        groups.append(PromptGroup(first_token, end_token, longest, blocks, pages, tables, starts, lengths))
        first_token = end_token
    return FlatPages(k, v, groups, slots)


def _groups(num_pages: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """First and end of runs of sequences whose pages fit together."""
    found: list[tuple[int, int]] = []
    first = used = 0
    for seq, count in enumerate(num_pages):
        if count > capacity:
            raise ValueError(f"sequence {seq} has {count} pages, expected at most {capacity}, those of the scratch")
        if used + count > capacity:
            found.append((first, seq))
            first, used = seq, 0
        used += count
    return [*found, (first, len(num_pages))] if num_pages else found
