"""The tensors of a workspace: one list of names, shapes and dtypes for the writer, the reader and the model loader.

Linear weights are [out, in] as torch has them, q and k in the rotate-half order of Hugging Face checkpoints. `w_qkv`
of rank r stacks [q_r | k_r | v_r] along the output dimension, `w1`, `w3` (gate, up) are split along the output and
`wo`, `w2` (attention output, down) along the input dimension. The bias of `wo` belongs to the sum over ranks, so it is
stored for rank 0 alone: a loader that adds what it finds before the sum is right for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tritonmind.config import ModelConfig
from tritonmind.errors import ConfigError

# Weight type of config.ini -> dtype name in a safetensors header.
STORED_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
# Beside the weights where `tritonmind lite kv_qparams` has written it: scales of an int8 KV cache with quant_policy 4.
KV_SCALES_FILE = "kv_scales.safetensors"


class TensorSpec(NamedTuple):
    """One stored tensor. `dtype` is a safetensors name: F16, BF16 or F32."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        count = DTYPE_BYTES[self.dtype]
        for extent in self.shape:
            count *= extent
        return count


def check_tensor_parallel(model: ModelConfig, tp: int) -> None:
    """Raise ConfigError unless the heads and the feed-forward width divide by `tp` ranks."""
    if tp < 1:
        raise ConfigError(f"tensor_para_size={tp} must be at least 1")
    for name, count in (
        ("head_num", model.num_heads),
        ("kv_head_num", model.num_kv_heads),
        ("inter_size", model.intermediate_size),
    ):
        if count % tp:
            raise ConfigError(f"tensor_para_size={tp} does not divide {name}={count} of {model.model_name}")


def common_tensor_specs(model: ModelConfig) -> dict[str, TensorSpec]:
    """Tensors that every rank reads whole, in file order."""
    return _by_name(_common(model), _stored_dtype(model))


def tensor_specs(model: ModelConfig, tp: int, rank: int) -> dict[str, TensorSpec]:
    """Tensors of one rank out of `tp`, in file order. Raises ConfigError when `tp` does not fit the model."""
    check_tensor_parallel(model, tp)
    assert 0 <= rank < tp
    return _by_name(_ranked(model, tp, rank), _stored_dtype(model))


def kv_scale_specs(model: ModelConfig, tp: int) -> list[list[TensorSpec]]:
    """Tensors of KV_SCALES_FILE by rank and layer: [k_scale, k_zero, v_scale, v_zero], see kernels/kv_quant.py."""
    return [
        [TensorSpec(f"layers.{i}.past_kv_scale.{rank}", (4,), "F32") for i in range(model.num_layers)]
        for rank in range(tp)
    ]


def _stored_dtype(model: ModelConfig) -> str:
    if model.weight_type not in STORED_DTYPES:
        raise ConfigError(f"weight_type={model.weight_type} is not one of {', '.join(STORED_DTYPES)}")
    return STORED_DTYPES[model.weight_type]


def _by_name(shapes: Iterator[tuple[str, tuple[int, ...]]], dtype: str) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, shape, dtype) for name, shape in shapes}


def _common(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = model.hidden_size
    yield "tok_embeddings.weight", (model.vocab_size, hidden)
    for i in range(model.num_layers):
        yield f"layers.{i}.attention_norm.weight", (hidden,)
        yield f"layers.{i}.ffn_norm.weight", (hidden,)
    yield "norm.weight", (hidden,)
    if not model.tie_word_embeddings:
        yield "output.weight", (model.vocab_size, hidden)


def _ranked(model: ModelConfig, tp: int, rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = model.hidden_size
    q_width = model.num_heads * model.head_dim // tp
    qkv_width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tp
    inter = model.intermediate_size // tp
    for i in range(model.num_layers):
        attention, feed_forward = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        yield f"{attention}.w_qkv.{rank}.weight", (qkv_width, hidden)
        if model.qkv_bias:
            yield f"{attention}.w_qkv.{rank}.bias", (qkv_width,)
        yield f"{attention}.wo.{rank}.weight", (hidden, q_width)
        if model.o_bias and rank == 0:
            yield f"{attention}.wo.{rank}.bias", (hidden,)
        yield f"{feed_forward}.w1.{rank}.weight", (inter, hidden)
        yield f"{feed_forward}.w3.{rank}.weight", (inter, hidden)
        yield f"{feed_forward}.w2.{rank}.weight", (hidden, inter)
