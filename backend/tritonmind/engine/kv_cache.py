"""Sizes and allocates the paged KV cache, and says where the memory goes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tritonmind.config import CacheConfig, EngineConfig, ModelConfig, QuantPolicy
from tritonmind.errors import ConfigError
from tritonmind.kernels import KVScales, LayerScales, TokenScales
from tritonmind.kernels.attention import MAX_HEAD_DIM
from tritonmind.kernels.dispatch import MIN_TILE
from tritonmind.model_inputs import KVCache
from tritonmind.model_source import ModelSource

# A fraction of a host's memory would mostly lie idle. A session of full length fits in any case, memory permitting.
CPU_CACHE_LIMIT_BYTES = 4 << 30


class MemoryPlan(NamedTuple):
    """What the device's memory is used for, in bytes."""

    free_bytes: int  # before the cache is allocated, weights loaded
    reserved_bytes: int  # kept for activations
    block_bytes: int
    num_blocks: int
    block_size: int
    weights_bytes: int = 0  # already allocated, so no part of free_bytes; 0 when not told
    graphs_bytes: int = 0  # kept for captured graphs
    scratch_bytes: int = 0  # already allocated, for prompts over int8 pages
    is_int8: bool = False

    @property
    def cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def parts(self) -> dict[str, int]:
        """Bytes of each part that there is, by name; of graphs what is kept for them."""
        parts = {
            "weights": self.weights_bytes,
            "activations": self.reserved_bytes,
            "graphs": self.graphs_bytes,
            "prompts' pages": self.scratch_bytes,
            "KV cache": self.cache_bytes,
        }
        return {name: num_bytes for name, num_bytes in parts.items() if num_bytes}

    def describe(self) -> str:
        """One line with every part, and what is left for others."""
        left = self.free_bytes - self.reserved_bytes - self.graphs_bytes - self.cache_bytes
        *others, cache = [f"{name} {_gib(num_bytes)}" for name, num_bytes in self.parts().items()]
        blocks = f"{self.num_blocks} blocks of {self.block_size} tokens ({self.num_blocks * self.block_size} tokens)"
        kind = "int8 " if self.is_int8 else ""
        return ", ".join([*others, f"{kind}{cache} = {blocks}", f"{_gib(left)} stay free"])


def check_sizes(config: EngineConfig, device: torch.device) -> None:
    """Raise ConfigError for heads or blocks that the kernels for GPUs cannot have. Nothing to check on a CPU."""
    if device.type == "cpu":
        return
    if config.model.head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"heads of {config.model.head_dim} values (head_dim) are not supported on a GPU, whose kernels have at "
            f"most {MAX_HEAD_DIM}: use device='cpu'"
        )
    if config.cache.block_size < MIN_TILE:
        raise ConfigError(
            f"cache_block_seq_len={config.cache.block_size} must be at least {MIN_TILE} on a GPU: take 64"
        )


def block_bytes(model: ModelConfig, cache: CacheConfig, tensor_parallel_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block on one rank, all layers, K and V, and the scales of their tokens where those have some."""
    num_rows = 2 * model.num_layers * (model.num_kv_heads // tensor_parallel_size) * cache.block_size
    if cache.quant_policy is QuantPolicy.NONE:
        return num_rows * model.head_dim * dtype.itemsize
    scale_bytes = torch.float32.itemsize if cache.quant_policy is QuantPolicy.KV_INT8 else 0
    return num_rows * (model.head_dim + scale_bytes)


def estimated_activation_bytes(config: EngineConfig, dtype: torch.dtype) -> int:
    """An upper estimate of what one full step allocates beside the cache: a layer's activations and the logits.

    On a GPU only weights that are clearly too large are refused by it; the cache is sized by what the warm-up took.
    """
    model, limits = config.model, config.scheduler
    qkv_size = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_token = 4 * model.hidden_size + 2 * qkv_size + 3 * model.intermediate_size
    # Sampling holds logits, scores, noise, a sorted copy and its int64 order.
    per_logit_row = 6 * model.vocab_size * 4
    return limits.max_num_batched_tokens * per_token * dtype.itemsize + limits.max_num_seqs * per_logit_row


def scratch_blocks(config: EngineConfig) -> int:
    """Pages of the scratch through which prompts go over int8 pages: any one session's, or two steps' new tokens.

    The prompts of a step go through it in several groups where it is too small for all of them.
    """
    limits, block_size = config.scheduler, config.cache.block_size
    return max(-(-limits.max_model_len // block_size), 2 * -(-limits.max_num_batched_tokens // block_size))


def plan_memory(
    config: EngineConfig,
    *,
    dtype: torch.dtype,
    free_bytes: int,
    reserved_bytes: int,
    is_cpu: bool,
    weights_bytes: int = 0,
    graphs_bytes: int = 0,
    scratch_bytes: int = 0,
) -> MemoryPlan:
    """Number of blocks for `cache_max_entry_count`. ConfigError if not even one session of `session_len` fits.

    free_bytes is what the loaded weights and the scratch left; activations (reserved_bytes) and graphs come out of it
    first.
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
        free_bytes, reserved_bytes, size, num_blocks, config.cache.block_size, weights_bytes, graphs_bytes,
        scratch_bytes, config.cache.quant_policy is not QuantPolicy.NONE,
    )  # fmt: skip


def _remedy(num_blocks: int | None) -> str:
    if num_blocks is not None:
        return f"raise cache_max_entry_count, to {num_blocks} blocks for instance, or lower session_len"
    return "lower session_len, max_batch_size or max_context_token_num, or free memory"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def calibrated_scales(source: ModelSource, config: EngineConfig) -> list[LayerScales] | None:
    """The scales of each layer for quant_policy 4; None for other policies.

    Raises ConfigError where the source has none, or what are no scales.
    """
    policy = config.cache.quant_policy
    if policy is not QuantPolicy.KV_INT8_CALIBRATED:
        return None
    values = source.kv_scales(rank=0)
    command = "tritonmind lite kv_qparams --work_dir WORK_DIR --turbomind_dir WORKSPACE"
    if values is None:
        raise ConfigError(
            f"quant_policy={int(policy)} needs the scales of a calibration, and there are none: run `tritonmind lite "
            f"calibrate` and `{command}`, or use quant_policy={int(QuantPolicy.KV_INT8)}, which needs none"
        )
    assert values.shape == (config.model.num_layers, len(LayerScales._fields))
    scales = [LayerScales(*row) for row in values.tolist()]
    for layer, row in enumerate(scales):
        for name, value in row._asdict().items():
            if not math.isfinite(value) or (name.endswith("_scale") and value <= 0):
                wanted = "positive and finite" if name.endswith("_scale") else "finite"
                raise ConfigError(
                    f"quant_policy={int(policy)}: {name} of layer {layer} is {value}, expected {wanted}: calibrate "
                    f"again, and write the scales with `{command}`"
                )
    return scales


def allocate_scratch(
    config: EngineConfig, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The pages of KVCache.scratch; None where nobody needs them."""
    if config.cache.quant_policy is QuantPolicy.NONE or device.type == "cpu":
        return None
    shape = _pool_shape(config, scratch_blocks(config))
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)


def allocate(
    config: EngineConfig,
    num_blocks: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    layer_scales: list[LayerScales] | None = None,
    scratch: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[KVCache]:
    """Zero-filled pools, one per layer: a stale NaN in an unused slot would survive masking as 0 * NaN.

    layer_scales: for quant_policy 4. scratch: what allocate_scratch gave.
    """
    shape, policy = _pool_shape(config, num_blocks), config.cache.quant_policy
    stored = dtype if policy is QuantPolicy.NONE else torch.uint8

    def pool() -> torch.Tensor:
        return torch.zeros(shape, dtype=stored, device=device)

    def scales(layer: int) -> KVScales | None:
        if policy is QuantPolicy.KV_INT8:
            return TokenScales(torch.zeros(shape[:3], device=device), torch.zeros(shape[:3], device=device))
        if layer_scales is None:
            assert policy is QuantPolicy.NONE
            return None
        return layer_scales[layer]

    return [KVCache(pool(), pool(), scales(layer), scratch) for layer in range(config.model.num_layers)]


def _pool_shape(config: EngineConfig, num_blocks: int) -> tuple[int, int, int, int]:
    model = config.model
    return num_blocks, model.num_kv_heads // config.tensor_parallel_size, config.cache.block_size, model.head_dim
