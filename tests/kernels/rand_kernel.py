"""tl.rand behind a launcher. A file of its own, because importing it needs Triton."""

import torch
import triton
import triton.language as tl


@triton.jit
def _rand_kernel(seeds_ptr, offsets_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    offsets = tl.load(offsets_ptr + row * WIDTH + column, mask=inside, other=0)
    tl.store(out_ptr + row * WIDTH + column, tl.rand(tl.load(seeds_ptr + row), offsets), mask=inside)


def triton_rand(seeds: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """tl.rand(seeds[b], offsets[b]) for offsets [B, n] int64."""
    num_rows, width = offsets.shape
    out = torch.full(offsets.shape, float("nan"), device=offsets.device)
    _rand_kernel[(num_rows,)](seeds, offsets, out, WIDTH=width, BLOCK=triton.next_power_of_2(width))
    return out
