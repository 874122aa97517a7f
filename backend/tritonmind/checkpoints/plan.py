"""Which rows and columns of which checkpoint tensors make up each tensor of a workspace, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tritonmind.checkpoints.source import SourceTensor
from tritonmind.config import ModelConfig
from tritonmind.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SOURCE_DTYPES = ("F16", "BF16", "F32")
# Old Llama checkpoints store the rotary frequencies, which follow from the configuration.
_DERIVED_SUFFIX = ".self_attn.rotary_emb.inv_freq"


class Part(NamedTuple):
    """Elements start to stop of a checkpoint tensor along `dim`."""

    source: str
    dim: int
    start: int
    stop: int


class Step(NamedTuple):
    """One workspace tensor: its parts, stacked as rows."""

    target: str
    parts: tuple[Part, ...]


class _Projection(NamedTuple):
    sources: tuple[str, ...]
    split_dim: int  # of the weight; a bias belongs to dimension 0
    has_bias: bool


def expected_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors, with their shapes, that a checkpoint of this model must have."""
    hidden, head_dim, inter = model.hidden_size, model.head_dim, model.intermediate_size
    q_width, kv_width = model.num_heads * head_dim, model.num_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    for i in range(model.num_layers):
        layer = f"model.layers.{i}"
        for projection, width in (("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width)):
            shapes[f"{layer}.self_attn.{projection}.weight"] = (width, hidden)
            if model.qkv_bias:
                shapes[f"{layer}.self_attn.{projection}.bias"] = (width,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q_width)
        if model.o_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inter, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inter)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        shapes[HEAD] = (model.vocab_size, hidden)
    return shapes


def check_tensors(model: ModelConfig, tensors: Mapping[str, SourceTensor], where: object) -> None:
    """Raise CheckpointError naming the tensor unless `tensors` are those of the model and of a dtype we read."""
    expected = expected_tensors(model)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: tensor {name} is missing")
        found = tensors[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{found.file}: tensor {name} has shape {list(found.shape)}, config.json asks for {list(shape)}"
            )
        if found.dtype not in SOURCE_DTYPES:
            raise CheckpointError(
                f"{found.file}: tensor {name} is {found.dtype}, not one of {', '.join(SOURCE_DTYPES)}"
            )
    for name, found in sorted(tensors.items()):
        tied_head = name == HEAD and model.tie_word_embeddings
        if name not in expected and not name.endswith(_DERIVED_SUFFIX) and not tied_head:
            raise CheckpointError(
                f"{found.file}: tensor {name} is not one of {model.architecture} as config.json has it"
            )


def conversion_plan(model: ModelConfig, tp: int) -> Iterator[Step]:
    """Every tensor of the workspace, in an order that the files of tensor_layout can be written in."""
    shapes = expected_tensors(model)

    def whole(target: str, source: str) -> Step:
        return Step(target, (Part(source, 0, 0, shapes[source][0]),))

    yield whole("tok_embeddings.weight", EMBEDDING)
    for i in range(model.num_layers):
        layer = f"model.layers.{i}"
        yield whole(f"layers.{i}.attention_norm.weight", f"{layer}.input_layernorm.weight")
        yield whole(f"layers.{i}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight")
        for name, projection in _projections(model).items():
            sources = [f"{layer}.{source}" for source in projection.sources]
            for rank in range(tp):
                target = f"layers.{i}.{name}.{rank}"
                weights = [f"{source}.weight" for source in sources]
                yield Step(f"{target}.weight", _slices(weights, projection.split_dim, shapes, tp, rank))
                biases = [f"{source}.bias" for source in sources]
                if projection.has_bias and projection.split_dim == 0:
                    yield Step(f"{target}.bias", _slices(biases, 0, shapes, tp, rank))
                elif projection.has_bias and rank == 0:
                    yield Step(f"{target}.bias", _slices(biases, 0, shapes, 1, 0))
    yield whole("norm.weight", "model.norm.weight")
    if not model.tie_word_embeddings:
        yield whole("output.weight", HEAD)


def _projections(model: ModelConfig) -> dict[str, _Projection]:
    return {
        "attention.w_qkv": _Projection(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0, model.qkv_bias),
        "attention.wo": _Projection(("self_attn.o_proj",), 1, model.o_bias),
        "feed_forward.w1": _Projection(("mlp.gate_proj",), 0, False),
        "feed_forward.w3": _Projection(("mlp.up_proj",), 0, False),
        "feed_forward.w2": _Projection(("mlp.down_proj",), 1, False),
    }


def _slices(
    sources: list[str], dim: int, shapes: Mapping[str, tuple[int, ...]], tp: int, rank: int
) -> tuple[Part, ...]:
    parts = []
    for source in sources:
        width = shapes[source][dim] // tp
        parts.append(Part(source, dim, rank * width, (rank + 1) * width))
    return tuple(parts)
