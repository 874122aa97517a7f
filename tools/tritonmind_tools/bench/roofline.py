"""The fewest bytes and floating-point operations that a model's work takes, whatever engine does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tritonmind.config import ModelConfig, QuantPolicy

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
KV_SCALE_BYTES = 4  # of a token and head with quant_policy 8


def step_bytes(
    model: ModelConfig, dtype_bytes: int, batch_size: int, context: float, quant_policy: int = QuantPolicy.NONE
) -> float:
    """Fewest bytes one decode step must read: every weight once, and K and V of each sequence."""
    return weight_bytes(model, dtype_bytes) + kv_bytes(model, dtype_bytes, batch_size, context, quant_policy)


def weight_bytes(model: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of the weights that a decode step multiplies with, as they are stored; 4-bit ones are fp32 on a CPU."""
    layers, output = model.num_layers * _layer_weights(model), model.vocab_size * model.hidden_size
    if model.weight_type == "int4" and dtype_bytes == 2:
        # A scale in 16 bits and a zero point in 4 for each group.
        return layers // 2 + layers * 5 // (2 * model.group_size) + dtype_bytes * output
    return dtype_bytes * (layers + output)


def kv_bytes(
    model: ModelConfig, dtype_bytes: int, batch_size: int, context: float, quant_policy: int = QuantPolicy.NONE
) -> float:
    """Bytes of K and V of a batch of sequences with `context` tokens each, as they are stored."""
    head_bytes = model.head_dim * (1 if quant_policy else dtype_bytes)
    if quant_policy == QuantPolicy.KV_INT8:
        head_bytes += KV_SCALE_BYTES
    return batch_size * context * 2 * model.num_layers * model.num_kv_heads * head_bytes


def prefill_flops(model: ModelConfig, prompt_lens: Iterable[int]) -> float:
    """Operations that computing these prompts takes, attention causal, logits for the last token of each alone."""
    flops = 0.0
    for length in prompt_lens:
        scores = 4 * model.num_heads * model.head_dim * length * (length + 1) / 2
        flops += model.num_layers * (2 * length * _layer_weights(model) + scores)
        flops += 2 * model.vocab_size * model.hidden_size
    return flops


def decode_bytes(
    model: ModelConfig, dtype_bytes: int, lengths: Sequence[tuple[int, int]], max_batch: int,
    quant_policy: int = QuantPolicy.NONE,
) -> float:  # fmt: skip
    """Fewest bytes that the decode steps of these requests, (prompt, answer) tokens, read: full batches throughout.

    The first token of an answer comes out of its prompt's computation.
    """
    num_tokens = sum(answer - 1 for _, answer in lengths)
    num_steps = max(-(-num_tokens // max_batch), *(answer - 1 for _, answer in lengths))
    contexts = sum((answer - 1) * (prompt + answer / 2) for prompt, answer in lengths)
    return num_steps * weight_bytes(model, dtype_bytes) + kv_bytes(model, dtype_bytes, 1, contexts, quant_policy)


def _layer_weights(model: ModelConfig) -> int:
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return model.hidden_size * (qkv + model.num_heads * model.head_dim + 3 * model.intermediate_size)
