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
    """Some of a step's prompts one after the other.

    Page pages[i] of the scratch is to be a copy of blocks[i], for i below num_copies. The other tensors are the
    arguments of paged_prefill_attention for the group alone, with the pages of the scratch.
    """

    max_query_len: int  # 0: the host does not know
    num_copies: torch.Tensor  # [1] int32
    blocks: torch.Tensor  # [num_copies or more] int32
    pages: torch.Tensor  # as many, int32
    block_tables: torch.Tensor  # [S, max_blocks] int32
    cu_seqlens_q: torch.Tensor  # [S + 1] int32
    context_lens: torch.Tensor  # [S] int32


class FlatPages(NamedTuple):
    """A scratch of pages, [capacity, num_kv_heads, block_size, head_dim] each, and the groups that go through it.

    slots: [T] int32, where in the scratch rotary_kv_write puts each of the step's tokens, page * block_size + offset;
    -1 nowhere.
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
    lens: Sequence[tuple[int, int]] | None,
    num_tokens: int,
    written: bool = False,
) -> FlatPages | None:
    """Groups of prompts for the scratch k, v, once a step for all layers; None on a CPU, which needs none.

    The other tensors are those that paged_prefill_attention gets, on the device. lens: query_len and context_len of
    each sequence, as the host knows them; None where it does not: then the caller knows that the scratch holds the
    pages of all. num_tokens: of the step. written: rotary_kv_write gets the plan too. Raises ValueError for a wrong
    shape, dtype or device, or a sequence that does not fit the scratch.
    """
    check_kv_pools(k, v, k.dtype, block_tables.device)
    capacity, _, block_size, _ = k.shape
    num_seqs = len(block_tables) if lens is None else len(lens)
    check_block_tables(block_tables, num_seqs, k.device)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,), torch.int32, k.device)
    check_tensor("context_lens", context_lens, (num_seqs,), torch.int32, k.device)
    if not use_triton(k):
        return None
    from tritonmind.kernels import triton_flat_pages

    slots = torch.full((num_tokens,), -1, dtype=torch.int32, device=k.device)
    if lens is None:
        sizes = [(0, num_seqs, 0, capacity)]
    else:
        ranges = _groups([-(-context_len // block_size) for _, context_len in lens], capacity)
        written = written and len(ranges) == 1
        sizes = [(first, end, *_sizes(lens[first:end], block_size, written)) for first, end in ranges]
    groups = []
    for first, end, max_query_len, max_copies in sizes:
        starts, lengths = cu_seqlens_q[first : end + 1], context_lens[first:end]
        plan = triton_flat_pages.plan_group(
            block_tables[first:end], starts, lengths, slots, block_size, max_copies, written
        )
        groups.append(PromptGroup(max_query_len, *plan, starts, lengths))
    return FlatPages(k, v, groups, slots)


def _sizes(lens: Sequence[tuple[int, int]], block_size: int, written: bool) -> tuple[int, int]:
    """The longest query run of a group, and how many pages are copied for it."""
    num_copies = sum(-(-(context_len - query_len * written) // block_size) for query_len, context_len in lens)
    return max(1, *(query_len for query_len, _ in lens), 1), num_copies


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
