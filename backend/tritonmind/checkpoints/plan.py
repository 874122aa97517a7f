"""Which rows and columns of which checkpoint tensors make up each tensor of a workspace, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, NoReturn

from tritonmind.checkpoints.source import Method, SourceTensor
from tritonmind.config import INT4_PER_WORD, ModelConfig
from tritonmind.errors import CheckpointError
from tritonmind.families import FAMILIES, names_of
from tritonmind.tensor_layout import AWQ_KINDS, awq_shapes

SOURCE_DTYPES = ("F16", "BF16", "F32")
WORD_DTYPE = "I32"


class Part(NamedTuple):
    """Elements start to stop of a checkpoint tensor along `dim`."""

    source: str
    dim: int
    start: int
    stop: int


class Step(NamedTuple):
    """One workspace tensor: its parts, stacked along `dim`.

    transform: what becomes of the values; "unit_rows" divides each row by its length.
    """

    target: str
    parts: tuple[Part, ...]
    dim: int = 0
    transform: Literal["unit_rows"] | None = None


class _Rows(NamedTuple):
    """Outputs start to stop of a linear layer of the checkpoint, named without the prefix of its decoder layer."""

    module: str
    start: int
    stop: int


def linear_layers(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer of the decoder, by its name in a checkpoint."""
    names, hidden, inter = names_of(model.architecture), model.hidden_size, model.intermediate_size
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    widths = (q_width, kv_width, kv_width)
    shapes = {
        **{name: (width, hidden) for name, width in zip(names.qkv, widths, strict=False)},
        names.wo: (hidden, q_width),
        names.gate: (inter, hidden),
        names.up: (inter, hidden),
        names.down: (hidden, inter),
    }
    if len(names.qkv) == 1:
        shapes[names.qkv[0]] = (sum(widths), hidden)
    return {_in_layer(model, i, name): shape for i in range(model.num_layers) for name, shape in shapes.items()}


def has_bias(model: ModelConfig, linear_layer: str) -> bool:
    """Whether the linear layer of that name in a checkpoint has one."""
    names = names_of(model.architecture)
    if linear_layer.endswith(f".{names.wo}"):
        return model.o_bias
    return model.qkv_bias and linear_layer.endswith(tuple(f".{name}" for name in names.qkv))


def _in_layer(model: ModelConfig, number: int, name: str) -> str:
    return f"{names_of(model.architecture).layer.format(number)}.{name}"


def max_parts(model: ModelConfig) -> int:
    """Of how many parts a tensor of the workspace consists at most."""
    return len(_qkv_rows(model, 1, 0))


def layer_number(model: ModelConfig, name: str) -> int | None:
    """Of the decoder layer that a tensor of a checkpoint belongs to; None of those that belong to none."""
    prefix = names_of(model.architecture).layer.format("")
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None


def vectors_of_layer(model: ModelConfig) -> dict[str, tuple[str, int]]:
    """By a layer's tensors of tensor_layout that are no linear layer's: name in the layer of a checkpoint, and size."""
    names = names_of(model.architecture)
    found = {"attention_norm.weight": (f"{names.attention_norm}.weight", model.hidden_size)}
    if model.qk_norm:
        found["attention.q_norm.weight"] = (f"{names.q_norm}.weight", model.head_dim)
        found["attention.k_norm.weight"] = (f"{names.k_norm}.weight", model.head_dim)
    return {**found, "ffn_norm.weight": (f"{names.ffn_norm}.weight", model.hidden_size)}


def expected_tensors(model: ModelConfig, method: Method | None) -> dict[str, tuple[int, ...]]:
    """The tensors, with their shapes, that a checkpoint of this model must have.

    method: the layout of 4-bit weights; None is one weight [out, in] for each linear layer.
    """
    names, hidden = names_of(model.architecture), model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {names.embedding: (model.vocab_size, hidden)}
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
        shapes |= {_in_layer(model, i, name): (size,) for name, size in vectors_of_layer(model).values()}
    shapes[names.norm] = (hidden,)
    if not model.tie_word_embeddings:
        shapes[names.head] = (model.vocab_size, hidden)
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
    known, derived = {*expected, *optional_tensors(model, method)}, names_of(model.architecture).derived
    for name, found in sorted(tensors.items()):
        if name not in known and not name.endswith(derived):
            raise CheckpointError(
                f"{found.file}: tensor {name} is not one of {model.architecture} as config.json has it"
            )


def optional_tensors(model: ModelConfig, method: Method | None) -> set[str]:
    """Tensors that a checkpoint of this model may have beside the expected ones, whose values must be looked at."""
    extra = {names_of(model.architecture).head}
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
    names, hidden, vocab_size = names_of(model.architecture), model.hidden_size, model.vocab_size
    vectors = vectors_of_layer(model)
    inter, q_width = model.intermediate_size, model.num_heads * model.head_dim
    yield Step("tok_embeddings.weight", (Part(names.embedding, 0, 0, vocab_size),))
    for i in range(model.num_layers):
        for target, (name, size) in vectors.items():
            yield Step(f"layers.{i}.{target}", (Part(_in_layer(model, i, name), 0, 0, size),))
        for rank in range(tp):
            gate, up = ((_Rows(name, *_share(inter, tp, rank)),) for name in (names.gate, names.up))
            yield from _outputs(model, i, f"attention.w_qkv.{rank}", _qkv_rows(model, tp, rank), model.qkv_bias)
            yield from _inputs(model, i, f"attention.wo.{rank}", names.wo, *_share(q_width, tp, rank))
            if model.o_bias and rank == 0:
                bias = Part(f"{_in_layer(model, i, names.wo)}.bias", 0, 0, hidden)
                yield Step(f"layers.{i}.attention.wo.{rank}.bias", (bias,))
            yield from _outputs(model, i, f"feed_forward.w1.{rank}", gate, False)
            yield from _outputs(model, i, f"feed_forward.w3.{rank}", up, False)
            yield from _inputs(model, i, f"feed_forward.w2.{rank}", names.down, *_share(inter, tp, rank))
    yield Step("norm.weight", (Part(names.norm, 0, 0, hidden),))
    if not model.tie_word_embeddings:
        yield Step("output.weight", (Part(names.head, 0, 0, vocab_size),), transform=_head_transform(model))


def _head_transform(model: ModelConfig) -> Literal["unit_rows"] | None:
    normalised = FAMILIES[model.architecture].normalised_head(model.vocab_size)
    return "unit_rows" if normalised else None


def _share(width: int, tp: int, rank: int) -> tuple[int, int]:
    return width * rank // tp, width * (rank + 1) // tp


def _qkv_rows(model: ModelConfig, tp: int, rank: int) -> tuple[_Rows, ...]:
    """What [q | k | v] of a rank consists of."""
    names, head_dim = names_of(model.architecture), model.head_dim
    counts = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    if names.kv_groups:
        (module,), group = names.qkv, model.num_heads // model.num_kv_heads
        # Of q, k and v: the first of its heads in a group, and the one behind its last.
        within = ((0, group), (group, group + 1), (group + 1, group + 2))
        groups = range(*_share(model.num_kv_heads, tp, rank))
        return tuple(
            _Rows(module, (i * (group + 2) + first) * head_dim, (i * (group + 2) + end) * head_dim)
            for first, end in within
            for i in groups
        )
    rows, begin = [], 0
    for number, count in enumerate(counts):
        start, stop = _share(count * head_dim, tp, rank)
        if len(names.qkv) == 1:
            rows.append(_Rows(names.qkv[0], begin + start, begin + stop))
        else:
            rows.append(_Rows(names.qkv[number], start, stop))
        begin += count * head_dim
    return tuple(rows)


def _outputs(model: ModelConfig, layer: int, target: str, rows: tuple[_Rows, ...], has_bias: bool) -> Iterator[Step]:
    """The tensors of a linear layer that has these outputs."""
    int4 = model.weight_type == "int4"
    # Of what is stored in 4 bits, dimension 1 is that of the outputs, eight of which share a word of two of the three.
    units = {"qweight": INT4_PER_WORD, "qzeros": INT4_PER_WORD, "scales": 1} if int4 else {"weight": 1}
    for kind, unit in units.items():
        if any(row.start % unit or row.stop % unit for row in rows):
            raise CheckpointError(
                f"{rows[0].module}: its heads of {model.head_dim} are no whole words of 4-bit weights"
            )
        parts = tuple(
            Part(f"{_in_layer(model, layer, row.module)}.{kind}", int(int4), row.start // unit, row.stop // unit)
            for row in rows
        )
        yield Step(f"layers.{layer}.{target}.{kind}", parts, int(int4))
    if has_bias:
        parts = tuple(Part(f"{_in_layer(model, layer, row.module)}.bias", 0, row.start, row.stop) for row in rows)
        yield Step(f"layers.{layer}.{target}.bias", parts)


def _inputs(model: ModelConfig, layer: int, target: str, module: str, start: int, stop: int) -> Iterator[Step]:
    """The tensors of the weight of a linear layer that reads inputs start to stop."""
    name, group_size = _in_layer(model, layer, module), model.group_size
    if model.weight_type != "int4":
        yield Step(f"layers.{layer}.{target}.weight", (Part(f"{name}.weight", 1, start, stop),))
        return
    for kind, unit in (("qweight", 1), ("qzeros", group_size), ("scales", group_size)):
        yield Step(f"layers.{layer}.{target}.{kind}", (Part(f"{name}.{kind}", 0, start // unit, stop // unit),))
