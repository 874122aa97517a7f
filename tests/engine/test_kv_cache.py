"""How many blocks a configuration gives, and what it says when they are too few."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tritonmind.config import CacheConfig, EngineConfig, ModelConfig, QuantPolicy, SchedulerConfig
from tritonmind.engine.kv_cache import CPU_CACHE_LIMIT_BYTES, MemoryPlan, check_sizes, plan_memory, scratch_blocks
from tritonmind.errors import ConfigError

GIB = 1 << 30
# 16 layers, 8 KV heads of 64: 64 KiB a token in fp32, so 4 MiB a block.
BLOCK_BYTES = 4 << 20
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    model_name="test",
    vocab_size=1000,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=8192,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=131072,
    weight_type="bf16",
    bos_token_id=1,
    eos_token_ids=(2,),
)


def plan(
    free: int,
    *,
    entries: float = 0.9,
    session_len: int = 4096,
    is_cpu: bool = True,
    policy: QuantPolicy = QuantPolicy.NONE,
) -> MemoryPlan:
    config = EngineConfig(
        model=MODEL,
        cache=CacheConfig(cache_max_entry_count=entries, quant_policy=policy),
        scheduler=SchedulerConfig(max_model_len=session_len),
    )
    return plan_memory(config, dtype=torch.float32, free_bytes=free, reserved_bytes=GIB, is_cpu=is_cpu)


def test_a_fraction_is_of_what_is_free_beside_activations() -> None:
    assert plan(11 * GIB, entries=0.5, is_cpu=False).num_blocks == 5 * GIB // BLOCK_BYTES


def test_a_cpu_cache_is_limited_but_holds_a_whole_session() -> None:
    assert plan(100 * GIB).num_blocks == CPU_CACHE_LIMIT_BYTES // BLOCK_BYTES
    assert plan(100 * GIB, session_len=131072).num_blocks == 131072 // 64


def test_a_count_is_taken_as_it_is() -> None:
    assert plan(2 * GIB, entries=100).num_blocks == 100


def test_too_little_memory_says_what_is_needed() -> None:
    needs = r"session_len=131072 tokens needs 2048 \(8\.00 GiB; 6\.00 GiB free, 1\.00 GiB of it for activations"
    with pytest.raises(ConfigError, match=needs + r".*\): lower session_len, max_batch_size"):
        plan(6 * GIB, session_len=131072)
    with pytest.raises(ConfigError, match=r"cache_max_entry_count=1000 blocks need 3\.91 GiB, but 1\.00 GiB are free"):
        plan(2 * GIB, entries=1000)


def test_too_small_a_share_of_enough_memory_says_what_to_ask_for() -> None:
    message = "gives 20 KV blocks .* needs 64 .*raise cache_max_entry_count, to 64 blocks"
    with pytest.raises(ConfigError, match=message):
        plan(2 * GIB, entries=20)
    assert plan(2 * GIB, entries=64).num_blocks == 64


def test_graphs_are_taken_from_the_cache_and_the_plan_adds_up() -> None:
    config = EngineConfig(
        model=MODEL, cache=CacheConfig(cache_max_entry_count=0.5), scheduler=SchedulerConfig(max_model_len=4096)
    )
    planned = plan_memory(
        config,
        dtype=torch.float32,
        free_bytes=12 * GIB,
        reserved_bytes=GIB,
        is_cpu=False,
        weights_bytes=7 * GIB,
        graphs_bytes=3 * GIB,
    )
    assert planned.num_blocks == 4 * GIB // BLOCK_BYTES
    assert planned.describe() == (
        "weights 7.00 GiB, activations 1.00 GiB, graphs 3.00 GiB, "
        "KV cache 4.00 GiB = 1024 blocks of 64 tokens (65536 tokens), 4.00 GiB stay free"
    )


@pytest.mark.parametrize(("policy", "row_bytes"), [(QuantPolicy.KV_INT8, 68), (QuantPolicy.KV_INT8_CALIBRATED, 64)])
def test_int8_blocks_are_small_and_said_to_be(policy: QuantPolicy, row_bytes: int) -> None:
    """Of a token and head: its bytes, and with quant_policy 8 the scale of each of K and V."""
    planned = plan(11 * GIB, policy=policy)
    assert planned.block_bytes == BLOCK_BYTES * row_bytes // (64 * 4)
    assert ", int8 KV cache 4.00 GiB = " in planned.describe()


def test_the_scratch_of_prompts_holds_a_session_or_two_steps() -> None:
    def blocks(session_len: int, max_num_batched_tokens: int) -> int:
        limits = SchedulerConfig(max_model_len=session_len, max_num_batched_tokens=max_num_batched_tokens)
        return scratch_blocks(EngineConfig(model=MODEL, cache=CacheConfig(), scheduler=limits))

    assert blocks(8192 + 1, 512) == 129
    assert blocks(1024, 4096) == 128


@pytest.mark.parametrize(
    ("head_dim", "block_size", "problem"),
    [
        (256, 64, r"heads of 256 values \(head_dim\) are not supported on a GPU, whose kernels have at most 128"),
        (128, 8, "cache_block_seq_len=8 must be at least 16 on a GPU: take 64"),
    ],
)
def test_what_the_kernels_of_a_gpu_cannot_have(head_dim: int, block_size: int, problem: str) -> None:
    """Said before weights are read."""
    config = EngineConfig(
        model=dataclasses.replace(MODEL, head_dim=head_dim),
        cache=CacheConfig(block_size=block_size),
        scheduler=SchedulerConfig(max_model_len=64),
    )
    check_sizes(config, torch.device("cpu"))
    with pytest.raises(ConfigError, match=problem):
        check_sizes(config, torch.device("cuda"))
