"""Sizes and allocates the paged KV cache, and says where the memory goes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonmind.config import CacheConfig, EngineConfig, ModelConfig, QuantPolicy
from tritonmind.errors import ConfigError

# A fraction of a host's memory would mostly lie idle. A session of full length fits in any case, memory permitting.
CPU_CACHE_LIMIT_BYTES = 4 << 30


class KVCache(NamedTuple):
    """K and V pools of one layer, [num_blocks, num_kv_heads, block_size, head_dim] each. K is stored after RoPE."""

    k: torch.Tensor
    v: torch.Tensor


class MemoryPlan(NamedTuple):
    """What the device's memory is used for, in bytes."""

    free_bytes: int  # before the cache is allocated, weights loaded
    reserved_bytes: int  # kept for activations
    block_bytes: int
    num_blocks: int
    block_size: int

    def describe(self) -> str:
        gib = 1 << 30
        return (
            f"{self.free_bytes / gib:.2f} GiB free beside the weights, {self.reserved_bytes / gib:.2f} GiB kept for "
            f"activations, KV cache {self.num_blocks * self.block_bytes / gib:.2f} GiB = {self.num_blocks} blocks of "
            f"{self.block_size} tokens ({self.num_blocks * self.block_size} tokens)"
        )


def block_bytes(model: ModelConfig, cache: CacheConfig, tensor_parallel_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block on one rank, all layers, K and V."""
    if cache.quant_policy is not QuantPolicy.NONE:
        raise ConfigError(f"quant_policy={int(cache.quant_policy)}: int8 KV cache is not available yet; use 0")
    per_layer = 2 * (model.num_kv_heads // tensor_parallel_size) * cache.block_size * model.head_dim
    return model.num_layers * per_layer * dtype.itemsize


def plan_memory(
    config: EngineConfig, *, dtype: torch.dtype, free_bytes: int, reserved_bytes: int, is_cpu: bool
) -> MemoryPlan:
    """Number of blocks for `cache_max_entry_count`. ConfigError if not even one session of `session_len` fits."""
    size = block_bytes(config.model, config.cache, config.tensor_parallel_size, dtype)
    wanted = config.cache.cache_max_entry_count
    usable = max(0, free_bytes - reserved_bytes)
    needed = -(-config.scheduler.max_model_len // config.cache.block_size)
    if wanted < 1:
        num_blocks = int(usable * wanted) // size
        if is_cpu:
            num_blocks = min(num_blocks, max(CPU_CACHE_LIMIT_BYTES // size, needed))
    else:
        num_blocks = int(wanted)
        if num_blocks * size > usable:
            raise ConfigError(
                f"cache_max_entry_count={num_blocks} blocks need {num_blocks * size / 2**30:.2f} GiB, "
                f"but {usable / 2**30:.2f} GiB are free; at most {usable // size} blocks fit"
            )
    if num_blocks < needed:
        raise ConfigError(
            f"cache_max_entry_count={wanted} gives {num_blocks} KV blocks of {config.cache.block_size} tokens, but one "
            f"session of session_len={config.scheduler.max_model_len} tokens needs {needed} "
            f"({needed * size / 2**30:.2f} GiB; {free_bytes / 2**30:.2f} GiB free): "
            f"lower session_len, raise cache_max_entry_count, or free memory"
        )
    return MemoryPlan(free_bytes, reserved_bytes, size, num_blocks, config.cache.block_size)


def allocate(config: EngineConfig, plan: MemoryPlan, *, dtype: torch.dtype, device: torch.device) -> list[KVCache]:
    """Zero-filled pools, one per layer: a stale NaN in an unused slot would survive masking as 0 * NaN."""
    model = config.model
    num_kv_heads = model.num_kv_heads // config.tensor_parallel_size
    shape = (plan.num_blocks, num_kv_heads, config.cache.block_size, model.head_dim)
    return [
        KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        for _ in range(model.num_layers)
    ]
