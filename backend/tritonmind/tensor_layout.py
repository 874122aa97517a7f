"""The tensors of a workspace: one list of names, shapes and dtypes for the writer, the reader and the model loader.

Linear weights are [out, in] as torch has them, q and k in the rotate-half order of Hugging Face checkpoints. `w_qkv`
of rank r stacks [q_r | k_r | v_r] along the output dimension, `w1`, `w3` (gate, up) are split along the output and
`wo`, `w2` (attention output, down) along the input dimension. The bias of `wo` belongs to the sum over ranks, so it is
stored for rank 0 alone: a loader that adds what it finds before the sum is right for any number of ranks.

With weight_type int4 three tensors take the place of each linear weight, in the portable AWQ form of
`kernels.awq_format`: `.qweight` [in, out / 8] and `.qzeros` [in / group_size, out / 8], eight outputs in an int32, and
`.scales` [in / group_size, out] fp16. Ranks split them along the same dimensions of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tritonmind.config import INT4_PER_WORD, ModelConfig
from tritonmind.errors import ConfigError

# Weight type of config.ini -> dtype name in a safetensors header.
STORED_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4}
# What stands for a linear weight in 4 bits, in the order of the files.
AWQ_KINDS = ("qweight", "qzeros", "scales")
# Beside the weights where `tritonmind lite kv_qparams` has written it: scales of an int8 KV cache with quant_policy 4.
KV_SCALES_FILE = "kv_scales.safetensors"


class TensorSpec(NamedTuple):
    """One stored tensor. `dtype` is a safetensors name: F16, BF16, F32 or, for words of 4-bit values, I32."""

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
    """Raise ConfigError unless heads, feed-forward width and groups of 4-bit weights divide by `tp` ranks."""
    if tp < 1:
        raise ConfigError(f"tensor_para_size={tp} must be at least 1")
    for name, count in (
        ("head_num", model.num_heads),
        ("kv_head_num", model.num_kv_heads),
        ("inter_size", model.intermediate_size),
    ):
        if count % tp:
            raise ConfigError(f"tensor_para_size={tp} does not divide {name}={count} of {model.model_name}")
    if model.weight_type == "int4":
        q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        for name, width, unit, what in (
            ("head_num*size_per_head", q_width, model.group_size, f"groups of group_size={model.group_size}"),
            ("inter_size", model.intermediate_size, model.group_size, f"groups of group_size={model.group_size}"),
            ("kv_head_num*size_per_head", kv_width, INT4_PER_WORD, f"words of {INT4_PER_WORD} 4-bit weights"),
        ):
            if width // tp % unit:
                raise ConfigError(
                    f"tensor_para_size={tp} cuts {name}={width} of {model.model_name} into parts of {width // tp}, "
                    f"which are no whole {what}: use fewer ranks"
                )


def common_tensor_specs(model: ModelConfig) -> dict[str, TensorSpec]:
    """Tensors that every rank reads whole, in file order."""
    return {spec.name: spec for spec in _common(model)}


def tensor_specs(model: ModelConfig, tp: int, rank: int) -> dict[str, TensorSpec]:
    """Tensors of one rank out of `tp`, in file order. Raises ConfigError when `tp` does not fit the model."""
    check_tensor_parallel(model, tp)
    assert 0 <= rank < tp
    return {spec.name: spec for spec in _ranked(model, tp, rank)}


def kv_scale_specs(model: ModelConfig, tp: int) -> list[list[TensorSpec]]:
    """Tensors of KV_SCALES_FILE by rank and layer: [k_scale, k_zero, v_scale, v_zero], see kernels/kv_quant.py."""
    return [
        [TensorSpec(f"layers.{i}.past_kv_scale.{rank}", (4,), "F32") for i in range(model.num_layers)]
        for rank in range(tp)
    ]


def awq_shapes(in_features: int, out_features: int, group_size: int) -> dict[str, tuple[int, int]]:
    """The shapes of AWQ_KINDS for a weight [out_features, in_features]."""
    num_groups, words = in_features // group_size, out_features // INT4_PER_WORD
    return {"qweight": (in_features, words), "qzeros": (num_groups, words), "scales": (num_groups, out_features)}


def _linear(model: ModelConfig, name: str, out_features: int, in_features: int) -> Iterator[TensorSpec]:
    if model.weight_type != "int4":
        yield TensorSpec(f"{name}.weight", (out_features, in_features), STORED_DTYPES[model.weight_type])
        return
    for kind, shape in awq_shapes(in_features, out_features, model.group_size).items():
        yield TensorSpec(f"{name}.{kind}", shape, "F16" if kind == "scales" else "I32")


def _common(model: ModelConfig) -> Iterator[TensorSpec]:
    hidden, dtype = model.hidden_size, STORED_DTYPES[model.float_type]
    yield TensorSpec("tok_embeddings.weight", (model.vocab_size, hidden), dtype)
    for i in range(model.num_layers):
        yield TensorSpec(f"layers.{i}.attention_norm.weight", (hidden,), dtype)
        if model.qk_norm:
            yield TensorSpec(f"layers.{i}.attention.q_norm.weight", (model.head_dim,), dtype)
            yield TensorSpec(f"layers.{i}.attention.k_norm.weight", (model.head_dim,), dtype)
        yield TensorSpec(f"layers.{i}.ffn_norm.weight", (hidden,), dtype)
    yield TensorSpec("norm.weight", (hidden,), dtype)
    if not model.tie_word_embeddings:
        yield TensorSpec("output.weight", (model.vocab_size, hidden), dtype)


def _ranked(model: ModelConfig, tp: int, rank: int) -> Iterator[TensorSpec]:
    hidden, dtype = model.hidden_size, STORED_DTYPES[model.float_type]
    q_width = model.num_heads * model.head_dim // tp
    qkv_width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tp
    inter = model.intermediate_size // tp
    for i in range(model.num_layers):
        attention, feed_forward = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        yield from _linear(model, f"{attention}.w_qkv.{rank}", qkv_width, hidden)
        if model.qkv_bias:
            yield TensorSpec(f"{attention}.w_qkv.{rank}.bias", (qkv_width,), dtype)
        yield from _linear(model, f"{attention}.wo.{rank}", hidden, q_width)
        if model.o_bias and rank == 0:
            yield TensorSpec(f"{attention}.wo.{rank}.bias", (hidden,), dtype)
        yield from _linear(model, f"{feed_forward}.w1.{rank}", inter, hidden)
        yield from _linear(model, f"{feed_forward}.w3.{rank}", inter, hidden)
        yield from _linear(model, f"{feed_forward}.w2.{rank}", hidden, inter)
