"""A Hugging Face config.json as a ModelConfig. What the engine cannot do is refused here, by name.

Keys that are neither read nor listed in families.py have no part in what the architecture's own class computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from tritonmind.config import FloatType, ModelConfig, RopeScaling, WeightType
from tritonmind.errors import CheckpointError, ConfigError
from tritonmind.families import ARCHITECTURES, FAMILIES, UNSUPPORTED, Family

# What each kind of rotary scaling is described by: the type and whether it must be there. Nothing else is understood.
_ROPE_FIELDS: dict[str, dict[str, tuple[type, bool]]] = {
    "linear": {"factor": (float, True)},
    "dynamic": {"factor": (float, True)},
    "llama3": {
        "factor": (float, True),
        "low_freq_factor": (float, True),
        "high_freq_factor": (float, True),
        "original_max_position_embeddings": (int, True),
    },
    "yarn": {
        "factor": (float, True),
        "original_max_position_embeddings": (int, False),
        "attention_factor": (float, False),
        "beta_fast": (float, False),
        "beta_slow": (float, False),
        "mscale": (float, False),
        "mscale_all_dim": (float, False),
        "truncate": (bool, False),
    },
    "longrope": {
        "factor": (float, False),
        "original_max_position_embeddings": (int, True),
        "attention_factor": (float, False),
        "short_factor": (list, True),
        "long_factor": (list, True),
    },
}
_ORIGINAL = "original_max_position_embeddings"
# finetuned: whether the model was trained with it, which changes nothing.
_ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}

T = TypeVar("T", int, float, bool, str, list)


def model_config_from_hf(
    config: Mapping[str, Any],
    where: object,
    *,
    model_name: str,
    weight_type: WeightType,
    group_size: int = 0,
    unquantized_type: FloatType = "fp16",
    bos_token_id: int,
    eos_token_ids: tuple[int, ...],
) -> ModelConfig:
    """Defaults are those of the architecture's class. Raises CheckpointError naming `where`, the key and its value."""
    architecture = check_architecture(config, where)
    family = FAMILIES[architecture]
    reader = ConfigReader(_as_llama(config, family, where), where)
    _refuse_unsupported(reader)
    if reader.get("hidden_act", str, "silu") != "swish":
        reader.refuse_unless("hidden_act", str, "silu", "silu")
    num_heads = reader.get("num_attention_heads", int)
    hidden_size = reader.get("hidden_size", int)
    rope_theta, rope_scaling = _rope(reader)
    vocab_size = reader.get("vocab_size", int)
    for token_id in (bos_token_id, *eos_token_ids):
        if not 0 <= token_id < vocab_size:
            raise CheckpointError(f"{where}: token id {token_id} (bos or eos) is not below vocab_size={vocab_size}")
    try:
        return ModelConfig(
            architecture=architecture,
            model_name=model_name,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=reader.get("num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=reader.get("num_key_value_heads", int, num_heads),
            head_dim=reader.get("head_dim", int, hidden_size // max(num_heads, 1)),
            intermediate_size=reader.get("intermediate_size", int),
            norm_eps=reader.get("rms_norm_eps", float, 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=reader.get("max_position_embeddings", int, 2048),
            qkv_bias=_has_bias(reader, family.qkv_bias),
            o_bias=_has_bias(reader, family.o_bias),
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(reader, family),
            use_logn_attn=reader.get("use_logn_attn", bool, False),
            tie_word_embeddings=reader.get("tie_word_embeddings", bool, False),
            weight_type=weight_type,
            group_size=group_size,
            unquantized_type=unquantized_type,
            bos_token_id=bos_token_id,
            eos_token_ids=eos_token_ids,
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def check_architecture(config: Mapping[str, Any], where: object) -> str:
    """The checkpoint's architecture. Raises CheckpointError, with the known ones, for one that the engine lacks."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"{where}: architectures={names!r} does not name one architecture")
    if names[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: architecture {names[0]} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return names[0]


def _as_llama(config: Mapping[str, Any], family: Family, where: object) -> Mapping[str, Any]:
    """The configuration with Llama's keys, and the family's own defaults."""

    def refuse(what: str) -> NoReturn:
        raise CheckpointError(f"{where}: {what} is not supported")

    if family.adapt is not None:
        config = family.adapt(config, refuse)
    renamed = {key: config[name] for key, name in family.keys.items() if name in config}
    # A key that is null has no default: with Mistral it means that there is no window.
    return {**family.defaults, **config, **renamed}


def _refuse_unsupported(reader: ConfigReader) -> None:
    for feature in UNSUPPORTED:
        for key in feature.keys:
            value = reader.config.get(key)
            if value and value not in feature.neutral:
                raise CheckpointError(
                    f"{reader.where}: {key}={value!r} asks for {feature.name}, which is not supported"
                )


def _has_bias(reader: ConfigReader, known: bool | str) -> bool:
    return reader.get(known, bool, False) if isinstance(known, str) else known


def _sliding_window(reader: ConfigReader, family: Family) -> int:
    """Tokens that a query of any layer sees, 0 for all; Mistral's `sliding_window`, which Qwen has a switch for."""
    config, where = reader.config, reader.where
    window = reader.get("sliding_window", int, 0)
    kinds = reader.get("layer_types", list, [])
    if not family.windowed:
        if window or any(kind != "full_attention" for kind in kinds):
            raise CheckpointError(
                f"{where}: a sliding window (sliding_window={config.get('sliding_window')!r}, "
                f"layer_types={kinds!r}) is not one of {config['architectures'][0]}"
            )
        return 0
    if unknown := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise CheckpointError(f"{where}: layer_types: layers of type {unknown[0]!r} are not supported")
    num_layers, first = reader.get("num_hidden_layers", int), 0
    if "use_sliding_window" in family.defaults:
        window = window if reader.get("use_sliding_window", bool, False) else 0
        first = reader.get("max_window_layers", int, 0)
    num_windowed = kinds.count("sliding_attention") if kinds else max(num_layers - first, 0)
    if not window:
        return 0
    if num_windowed not in (0, num_layers):
        raise CheckpointError(
            f"{where}: {num_windowed} of {num_layers} layers have a sliding window, which is not supported: "
            "all layers must have one, or none"
        )
    return window if num_windowed else 0


def token_ids(value: Any, where: object, key: str) -> tuple[int, ...]:
    """A token id, a list of them or null, as a tuple."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise CheckpointError(f"{where}: {key}={value!r} is neither a token id nor a list of them")
    return tuple(ids)


class ConfigReader:
    """Typed values of a JSON object. Errors are CheckpointErrors naming `where`, the key and its value."""

    def __init__(self, config: Mapping[str, Any], where: object) -> None:
        self.config = config
        self.where = where

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.where}: {key} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise CheckpointError(f"{self.where}: {key}={value!r} is not of type {kind.__name__}")
        return value

    def refuse_unless(self, key: str, kind: type[T], supported: T, default: T | None = None) -> None:
        value = self.get(key, kind, default)
        if value != supported:
            raise CheckpointError(f"{self.where}: {key}={value!r} is not supported: only {supported!r} is")


def _rope(reader: ConfigReader) -> tuple[float, RopeScaling | None]:
    """Transformers 5 writes rope_parameters; before, it was rope_theta with rope_scaling beside it."""
    config, where = reader.config, reader.where
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope, older = config.get(key), config.get("rope_scaling")
    if older and older != rope:
        raise CheckpointError(f"{where}: rope_scaling={older!r} stands beside rope_parameters: put it into that")
    if rope is None:
        return reader.get("rope_theta", float, 10000.0), None
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: {key}={rope!r} is not an object")
    inner = ConfigReader(rope, f"{where}: {key}")
    theta = inner.get("rope_theta", float, reader.get("rope_theta", float, 10000.0))
    inner.refuse_unless("partial_rotary_factor", float, 1.0, 1.0)
    rope_type = inner.get("rope_type", str, inner.get("type", str, "default"))
    if rope_type == "default":
        fields = {}
    elif rope_type in _ROPE_FIELDS:
        fields = _ROPE_FIELDS[rope_type]
    else:
        raise CheckpointError(
            f"{where}: {key} of type {rope_type!r} is not supported; supported are {', '.join(_ROPE_FIELDS)}"
        )
    if _ORIGINAL in fields and config.get(_ORIGINAL) is not None:  # beside the scaling it comes before that in it
        rope = {**rope, _ORIGINAL: config[_ORIGINAL]}
        inner = ConfigReader(rope, inner.where)
    given = {name: value for name, value in rope.items() if value is not None}
    if unknown := sorted(given.keys() - _ROPE_COMMON - fields.keys()):
        raise CheckpointError(
            f"{where}: {key} of type {rope_type} has {unknown[0]}={rope[unknown[0]]!r}: not supported"
        )
    if not fields:
        return theta, None
    values: dict[str, Any] = {
        name: inner.get(name, kind) for name, (kind, needed) in fields.items() if needed or name in given
    }
    trained = reader.get("max_position_embeddings", int, 2048)
    try:
        return theta, _resolved(rope_type, values, trained)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {key}: {error}") from None


def _resolved(rope_type: str, values: dict[str, Any], max_position_embeddings: int) -> RopeScaling:
    """Of yarn (Peng et al. 2023) and longrope (Ding et al. 2024) the attention factor is made of the other fields.

    Formulas and defaults are Transformers'.
    """
    if rope_type in ("yarn", "longrope"):
        original = values.setdefault("original_max_position_embeddings", max_position_embeddings)
        factor = values.setdefault("factor", max(max_position_embeddings / original, 1.0))
        scales = values.pop("mscale", 0.0), values.pop("mscale_all_dim", 0.0)
        if "attention_factor" not in values:
            if rope_type == "longrope":
                values["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original))
            elif all(scales):
                values["attention_factor"] = _mscale(factor, scales[0]) / _mscale(factor, scales[1])
            else:
                values["attention_factor"] = _mscale(factor, 1.0)
    for name in ("short_factor", "long_factor"):
        if name in values:
            values[name] = tuple(float(value) for value in values[name])
    return RopeScaling(rope_type=rope_type, **values)  # type: ignore[arg-type]


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
