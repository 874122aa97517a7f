"""What kernel tests share: the implementations under test, and paged KV pools that punish reading the wrong slot."""

from typing import NamedTuple

import torch

from tritonmind.kernels import kv_quant
from tritonmind.kernels.kv_quant import KVScales, LayerScales, TokenScales


class Target(NamedTuple):
    """Where and in which dtype a launcher runs. `triton` is False for the CPU path in torch."""

    triton: bool
    device: str
    dtype: torch.dtype

    def randn(self, *shape: int) -> torch.Tensor:
        """Random values of this dtype, drawn on the CPU so that a seed means the same everywhere."""
        return torch.randn(shape).to(self.device, self.dtype)


# bf16 is left out of the interpreter, which computes it wrongly without an error.
CPU_TARGETS = {
    "cpu-fp32": Target(False, "cpu", torch.float32),
    "cpu-fp16": Target(False, "cpu", torch.float16),
    "cpu-bf16": Target(False, "cpu", torch.bfloat16),
    "interpreter-fp32": Target(True, "cpu", torch.float32),
    "interpreter-fp16": Target(True, "cpu", torch.float16),
}
GPU_TARGETS = {
    "gpu-fp32": Target(True, "cuda", torch.float32),
    "gpu-fp16": Target(True, "cuda", torch.float16),
    "gpu-bf16": Target(True, "cuda", torch.bfloat16),
}


class Pages(NamedTuple):
    """Arguments of an attention launcher. Table entries past a sequence's pages name a page of NaN."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor


def make_pages(
    context_lens: list[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    target: Target,
    spare_columns: int = 1,
) -> Pages:
    """Pools of random K and V for these sequences, pages in random order, NaN in free pages and unused slots."""
    num_blocks = [-(-length // block_size) for length in context_lens]
    total = sum(num_blocks) + 3
    shape = (total, num_kv_heads, block_size, head_dim)
    k_cache, v_cache = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    order = torch.randperm(total).tolist()
    free = order.pop()
    block_tables = torch.full((len(context_lens), max(num_blocks) + spare_columns), free, dtype=torch.int32)
    for row, length in enumerate(context_lens):
        for index in range(num_blocks[row]):
            block = order.pop()
            block_tables[row, index] = block
            used = min(block_size, length - index * block_size)
            k_cache[block, :, :used] = torch.randn(num_kv_heads, used, head_dim)
            v_cache[block, :, :used] = torch.randn(num_kv_heads, used, head_dim)
    return Pages(
        k_cache.to(target.device, target.dtype),
        v_cache.to(target.device, target.dtype),
        block_tables.to(target.device),
        torch.tensor(context_lens, dtype=torch.int32, device=target.device),
    )


def int8_pages(pages: Pages, kind: str) -> tuple[Pages, KVScales]:
    """The pages as bytes, with scales of the "layer" or of each "token". Where they are NaN, scales of tokens are."""
    pools = [pool.float().nan_to_num(0.0) for pool in (pages.k_cache, pages.v_cache)]
    unused = pages.k_cache[..., 0].isnan()
    if kind == "token":
        stored, scales = zip(*map(kv_quant.quantise_tokens, pools), strict=True)
        for pool in scales:
            pool[unused] = float("nan")
        found: KVScales = TokenScales(*scales)
    else:
        # K and V differ in both, and neither lies around 0.
        pools[1] = 0.5 * pools[1] + 0.75
        ranges = [kv_quant.asymmetric_scale(pool.min(), pool.max()) for pool in (pools[0] - 0.5, pools[1])]
        found = LayerScales(*(float(value) for pair in ranges for value in pair))
        stored = (
            kv_quant.quantise(pools[0], found.k_scale, found.k_zero),
            kv_quant.quantise(pools[1], found.v_scale, found.v_zero),
        )
    for pool in stored:
        pool[unused] = 255
    return pages._replace(k_cache=stored[0], v_cache=stored[1]), found


def on_cpu(scales: KVScales) -> KVScales:
    """For the reference."""
    return TokenScales(scales.k.cpu(), scales.v.cpu()) if isinstance(scales, TokenScales) else scales
