"""Frozen, typed, strict configuration. The only source of defaults: the CLI and config.ini read theirs from here.

What is discovered at run time (number of KV blocks, memory plan) lives in other objects; nothing is written back here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, TypeVar

import msgspec

from tritonmind.errors import ConfigError

# Environment variable. Whoever stops a server first creates the file it names: the adapter then ends its requests in
# time. The server itself tells a model of its exit only once the model's last request has ended.
DRAIN_FILE_VARIABLE = "TRITONMIND_DRAIN_FILE"

FloatType = Literal["fp16", "bf16", "fp32"]
WeightType = Literal["fp16", "bf16", "fp32", "int4"]
# Weights of the input dimension that may share a scale when they are in 4 bits.
GROUP_SIZES = (32, 64, 128)
# Outputs whose 4-bit weights share a stored word.
INT4_PER_WORD = 8
T = TypeVar("T")


class QuantPolicy(IntEnum):
    """How K and V are stored. The numbers are those of the tutorial's `quant_policy`."""

    NONE = 0
    KV_INT8_CALIBRATED = 4
    KV_INT8 = 8


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary embedding scaling, fields as in a Hugging Face `rope_scaling` / `rope_parameters` dictionary.

    attention_factor: of the cosines and sines of yarn and longrope, resolved from what the checkpoint says.
    """

    rope_type: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ConfigError(f"rope_scaling: factor={self.factor} must be at least 1")
        needed: dict[str, tuple[str, ...]] = {
            "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": ("original_max_position_embeddings",),
            "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
        }
        for name in needed.get(self.rope_type, ()):
            if not getattr(self, name):
                raise ConfigError(f"rope_scaling of type {self.rope_type} needs {name}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Facts of a decoder, as `weights/model.json` holds them.

    `weight_type` is the type of the stored linear weights of the layers; `group_size` is 0 unless they are int4, and
    `unquantized_type`, the type of everything else, says something only then: read `float_type`. `qk_norm`: each head
    of q and k is normalised before it is rotated. `sliding_window`: how many tokens a query sees, itself included; 0 is
    all of them. `use_logn_attn`: queries beyond `max_position_embeddings`, the trained length, are scaled.
    """

    architecture: str
    model_name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    use_logn_attn: bool = False
    tie_word_embeddings: bool = False
    weight_type: WeightType
    group_size: int = 0
    unquantized_type: FloatType = "fp16"
    bos_token_id: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even: rotary embedding pairs its halves")
        if self.sliding_window < 0:
            raise ConfigError(f"sliding_window={self.sliding_window} must be 0 (none) or positive")
        if self.use_logn_attn and self.max_position_embeddings < 2:
            raise ConfigError("use_logn_attn needs max_position_embeddings of at least 2: it divides by its logarithm")
        for name in ("short_factor", "long_factor"):
            factors = () if self.rope_scaling is None else getattr(self.rope_scaling, name)
            if factors and len(factors) != self.head_dim // 2:
                raise ConfigError(f"rope_scaling: {name} has {len(factors)} values, not head_dim / 2")
        if self.weight_type == "int4":
            self._check_groups()
        elif self.group_size:
            raise ConfigError(f"group_size={self.group_size} must be 0 for weight_type={self.weight_type}")

    def _check_groups(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"group_size={self.group_size} must be one of {', '.join(map(str, GROUP_SIZES))} for weight_type=int4"
            )
        widths = self.input_widths
        fitting = [str(size) for size in GROUP_SIZES if not any(width % size for width in widths.values())]
        remedy = f"use {' or '.join(fitting)}" if fitting else "keep this model's weights in 16 bits"
        for name, width in widths.items():
            if width % self.group_size:
                raise ConfigError(f"group_size={self.group_size} does not divide {name}={width}: {remedy}")
        for name, width in self.output_widths.items():
            if width % INT4_PER_WORD:
                raise ConfigError(f"{name}={width} must be a multiple of {INT4_PER_WORD} for weight_type=int4")

    @property
    def input_widths(self) -> dict[str, int]:
        """What the linear layers read, by name."""
        return {
            "hidden_size": self.hidden_size,
            "num_heads*head_dim": self.num_heads * self.head_dim,
            "intermediate_size": self.intermediate_size,
        }

    @property
    def output_widths(self) -> dict[str, int]:
        """What the linear layers write, by name; q, k and v each by itself."""
        return {**self.input_widths, "num_kv_heads*head_dim": self.num_kv_heads * self.head_dim}

    @property
    def float_type(self) -> FloatType:
        """The type of the tensors that are not in 4 bits: all of them, where none is."""
        return self.unquantized_type if self.weight_type == "int4" else self.weight_type

    @property
    def attn_bias(self) -> bool:
        return self.qkv_bias or self.o_bias


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache. `cache_max_entry_count` below 1 is a fraction of free memory, else a number of blocks."""

    block_size: int = 64
    cache_max_entry_count: float = 0.9
    quant_policy: QuantPolicy = QuantPolicy.NONE
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.block_size <= 0 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"cache_block_seq_len={self.block_size} must be a power of two, such as 64")
        if not (math.isfinite(self.cache_max_entry_count) and self.cache_max_entry_count > 0):
            raise ConfigError(
                f"cache_max_entry_count={self.cache_max_entry_count} must be positive and finite: "
                "below 1 a fraction of free memory, else a number of blocks"
            )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine step and of the queue before it.

    `max_num_batched_tokens` 0 means automatic. `max_queue_size` 0 means unbounded.
    """

    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 0
    max_queue_size: int = 0

    def __post_init__(self) -> None:
        if self.max_model_len < 2:
            raise ConfigError(
                f"session_len={self.max_model_len} must be at least 2: a token of prompt and one of answer"
            )
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_batch_size={self.max_num_seqs} must be at least 1")
        if self.max_num_batched_tokens < 0 or 0 < self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_context_token_num={self.max_num_batched_tokens} must be 0 (automatic) or at least "
                f"max_batch_size={self.max_num_seqs}"
            )
        if self.max_queue_size < 0:
            raise ConfigError(f"max_queue_size={self.max_queue_size} must be 0 (unbounded) or positive")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an EngineCore needs beside the weights.

    `device` auto picks CUDA when there is one. `dtype` auto is the stored weight type on a GPU and fp32 on a CPU.
    `num_threads` 0 leaves torch's choice. `async_depth` is how many steps may be in flight before their tokens are
    read: 1 hides the host behind the GPU, 0 waits each step (the CPU gains nothing from 1). `lm_head_int8`: on a GPU
    steps of few logits read the output head in 8 bits, with a scale for each token of the vocabulary. `allow_pickle`: a
    checkpoint's weights may be read from pickle files.
    """

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    tensor_parallel_size: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    enforce_eager: bool = False
    lm_head_int8: bool = False
    allow_pickle: bool = False
    num_threads: int = 0
    async_depth: Literal["auto", 0, 1] = "auto"
    check_integrity_when_idle: bool = True

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1 or self.model.num_kv_heads % self.tensor_parallel_size:
            raise ConfigError(
                f"tensor_para_size={self.tensor_parallel_size} does not divide kv_head_num={self.model.num_kv_heads}"
            )
        if self.num_threads < 0:
            raise ConfigError(f"num_threads={self.num_threads} must be 0 (torch's choice) or positive")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON-ready data."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: dict[str, Any], *, where: str) -> T:
    """Build a configuration strictly: a wrong, missing or unknown key is a ConfigError naming it and `where`."""
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
