"""Which rows and columns of which checkpoint tensors make up each tensor of a workspace, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, NoReturn

from tritonmind.checkpoints.source import Method, SourceTensor
from tritonmind.config import INT4_PER_WORD, ModelConfig
from tritonmind.errors import CheckpointError
from tritonmind.tensor_layout import AWQ_KINDS, awq_shapes

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SOURCE_DTYPES = ("F16", "BF16", "F32")
WORD_DTYPE = "I32"
# Old Llama checkpoints store the rotary frequencies, which follow from the configuration.
_DERIVED_SUFFIX = ".self_attn.rotary_emb.inv_freq"


class Part(NamedTuple):
    """Elements start to stop of a checkpoint tensor along `dim`."""

    source: str
    dim: int
    start: int
    stop: int


class Step(NamedTuple):
    """One workspace tensor: its parts, stacked along `dim`."""

    target: str
    parts: tuple[Part, ...]
    dim: int = 0


class _Projection(NamedTuple):
    sources: tuple[str, ...]
    split_dim: int  # of the weight [out, in]; a bias belongs to dimension 0
    has_bias: bool


def linear_layers(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer of the decoder, by its name in a checkpoint."""
    hidden, inter = model.hidden_size, model.intermediate_size
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes = {
        "self_attn.q_proj": (q_width, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, q_width),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(model.num_layers) for name, shape in shapes.items()}


def has_bias(model: ModelConfig, linear_layer: str) -> bool:
    """Whether the linear layer of that name in a checkpoint has one."""
    return model.o_bias if linear_layer.endswith(".o_proj") else model.qkv_bias and ".self_attn." in linear_layer


def expected_tensors(model: ModelConfig, method: Method | None) -> dict[str, tuple[int, ...]]:
    """The tensors, with their shapes, that a checkpoint of this model must have.

    method: the layout of 4-bit weights; None is one weight [out, in] for each linear layer.
    """
    hidden = model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    for name, (out_features, in_features) in linear_layers(model).items():
        if method is None:
            shapes[f"{name}.weight"] = (out_features, in_features)
        else:
            awq = awq_shapes(in_features, out_features, model.group_size)
            if method == "gptq":
                awq["qweight"] = (in_features // INT4_PER_WORD, out_features)
            shapes |= {f"{name}.{kind}": shape for kind, shape in awq.items()}
        if has_bias(model, name):
            shapes[f"{name}.bias"] = (out_features,)
    for i in range(model.num_layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        shapes[HEAD] = (model.vocab_size, hidden)
    return shapes


def check_tensors(
    model: ModelConfig, tensors: Mapping[str, SourceTensor], where: object, method: Method | None = None
) -> None:
    """Raise CheckpointError naming the tensor unless `tensors` are those of the model and of a dtype we read."""
    expected = expected_tensors(model, method)
    for name, shape in expected.items():
        if name not in tensors:
            _missing(name, tensors, where)
        found = tensors[name]
        if found.shape != shape:
            groups = f" with group_size={model.group_size}" if name.endswith((".qzeros", ".scales")) else ""
            raise CheckpointError(
                f"{found.file}: tensor {name} has shape {list(found.shape)}, config.json asks for {list(shape)}{groups}"
            )
        dtypes = (WORD_DTYPE,) if name.endswith((".qweight", ".qzeros")) else SOURCE_DTYPES
        if found.dtype not in dtypes:
            raise CheckpointError(f"{found.file}: tensor {name} is {found.dtype}, not one of {', '.join(dtypes)}")
    known = {*expected, *optional_tensors(model, method)}
    for name, found in sorted(tensors.items()):
        if name not in known and not name.endswith(_DERIVED_SUFFIX):
            raise CheckpointError(
                f"{found.file}: tensor {name} is not one of {model.architecture} as config.json has it"
            )


def optional_tensors(model: ModelConfig, method: Method | None) -> set[str]:
    """Tensors that a checkpoint of this model may have beside the expected ones, whose values must be looked at."""
    extra = {HEAD}
    if method == "gptq":
        extra.update(f"{name}.{kind}" for name in linear_layers(model) for kind in ("g_idx", "bias"))
    return extra


def _missing(name: str, tensors: Mapping[str, SourceTensor], where: object) -> NoReturn:
    module, _, kind = name.rpartition(".")
    other = f"{module}.weight" if kind in AWQ_KINDS else f"{module}.qweight"
    if other in tensors:
        raise CheckpointError(
            f"{tensors[other].file}: {other} stands in the place of {name}: either all linear layers of the decoder "
            "must be in 4 bits, and nothing else, or none"
        )
    raise CheckpointError(f"{where}: tensor {name} is missing")


def conversion_plan(model: ModelConfig, tp: int) -> Iterator[Step]:
    """Every tensor of the workspace, in an order that the files of tensor_layout can be written in.

    With weight_type int4 the parts are those of tensors in the portable AWQ form, whatever the checkpoint holds.
    """
    int4 = model.weight_type == "int4"
    shapes = expected_tensors(model, "awq" if int4 else None)

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
                # The tensors of 4-bit weights are [in, out], the weight is [out, in].
                stack_dim = 1 if int4 else 0
                split_dim = projection.split_dim ^ stack_dim
                for kind in AWQ_KINDS if int4 else ("weight",):
                    parts = _slices([f"{source}.{kind}" for source in sources], split_dim, shapes, tp, rank)
                    yield Step(f"{target}.{kind}", parts, stack_dim)
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
