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
    weights_bytes: int = 0  # already allocated, so no part of free_bytes; 0 when not told
    graphs_bytes: int = 0  # kept for captured graphs

    @property
    def cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def describe(self) -> str:
        """One line with every part, and what is left for others."""
        left = self.free_bytes - self.reserved_bytes - self.graphs_bytes - self.cache_bytes
        taken = {"weights": self.weights_bytes, "activations": self.reserved_bytes, "graphs": self.graphs_bytes}
        parts = [f"{name} {_gib(num_bytes)}" for name, num_bytes in taken.items() if num_bytes]
        parts.append(
            f"KV cache {_gib(self.cache_bytes)} = {self.num_blocks} blocks of {self.block_size} tokens "
            f"({self.num_blocks * self.block_size} tokens)"
        )
        return ", ".join([*parts, f"{_gib(left)} stay free"])


def block_bytes(model: ModelConfig, cache: CacheConfig, tensor_parallel_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block on one rank, all layers, K and V."""
    if cache.quant_policy is not QuantPolicy.NONE:
        raise ConfigError(f"quant_policy={int(cache.quant_policy)}: int8 KV cache is not available yet; use 0")
    per_layer = 2 * (model.num_kv_heads // tensor_parallel_size) * cache.block_size * model.head_dim
    return model.num_layers * per_layer * dtype.itemsize


def plan_memory(
    config: EngineConfig,
    *,
    dtype: torch.dtype,
    free_bytes: int,
    reserved_bytes: int,
    is_cpu: bool,
    weights_bytes: int = 0,
    graphs_bytes: int = 0,
) -> MemoryPlan:
    """Number of blocks for `cache_max_entry_count`. ConfigError if not even one session of `session_len` fits.

    free_bytes is what the loaded weights left; activations (reserved_bytes) and graphs come out of it first.
    """
    size = block_bytes(config.model, config.cache, config.tensor_parallel_size, dtype)
    wanted = config.cache.cache_max_entry_count
    usable = max(0, free_bytes - reserved_bytes - graphs_bytes)
    needed = -(-config.scheduler.max_model_len // config.cache.block_size)
    if wanted < 1:
        num_blocks = int(usable * wanted) // size
        if is_cpu:
            num_blocks = min(num_blocks, max(CPU_CACHE_LIMIT_BYTES // size, needed))
    else:
        num_blocks = int(wanted)
        if num_blocks * size > usable:
            raise ConfigError(
                f"cache_max_entry_count={num_blocks} blocks need {_gib(num_blocks * size)}, "
                f"but {_gib(usable)} are free beside {_gib(reserved_bytes + graphs_bytes)} for activations and graphs; "
                f"at most {usable // size} blocks fit"
            )
    if num_blocks < needed:
        raise ConfigError(
            f"cache_max_entry_count={wanted} gives {num_blocks} KV blocks of {config.cache.block_size} tokens, but one "
            f"session of session_len={config.scheduler.max_model_len} tokens needs {needed} ({_gib(needed * size)}; "
            f"{_gib(free_bytes)} free, {_gib(reserved_bytes + graphs_bytes)} of it for activations and graphs): "
            + _remedy(needed if needed * size <= usable else None)
        )
    return MemoryPlan(
        free_bytes, reserved_bytes, size, num_blocks, config.cache.block_size, weights_bytes, graphs_bytes
    )


def _remedy(num_blocks: int | None) -> str:
    if num_blocks is not None:
        return f"raise cache_max_entry_count, to {num_blocks} blocks for instance, or lower session_len"
    return "lower session_len, max_batch_size or max_context_token_num, or free memory"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def allocate(config: EngineConfig, num_blocks: int, *, dtype: torch.dtype, device: torch.device) -> list[KVCache]:
    """Zero-filled pools, one per layer: a stale NaN in an unused slot would survive masking as 0 * NaN."""
    model = config.model
    num_kv_heads = model.num_kv_heads // config.tensor_parallel_size
    shape = (num_blocks, num_kv_heads, config.cache.block_size, model.head_dim)
    return [
        KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        for _ in range(model.num_layers)
    ]
