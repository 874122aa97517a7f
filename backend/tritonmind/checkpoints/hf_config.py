"""A Hugging Face config.json as a ModelConfig. What the engine cannot do is refused here, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from tritonmind.config import FloatType, ModelConfig, RopeScaling, WeightType
from tritonmind.errors import CheckpointError, ConfigError

ARCHITECTURES = ("LlamaForCausalLM",)
# What each kind of rotary scaling is described by. All of it is required, and nothing else is understood.
_ROPE_FIELDS: dict[str, dict[str, type]] = {
    "linear": {"factor": float},
    "dynamic": {"factor": float},
    "llama3": {
        "factor": float,
        "low_freq_factor": float,
        "high_freq_factor": float,
        "original_max_position_embeddings": int,
    },
}
_ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

T = TypeVar("T", int, float, bool, str)


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
    """Defaults are those of Transformers' LlamaConfig. Raises CheckpointError naming `where`, the key and its value."""
    architecture = check_architecture(config, where)
    reader = ConfigReader(config, where)
    reader.refuse_unless("hidden_act", str, "silu", "silu")
    reader.refuse_unless("mlp_bias", bool, False, False)
    num_heads = reader.get("num_attention_heads", int)
    hidden_size = reader.get("hidden_size", int)
    rope_theta, rope_scaling = _rope(reader)
    attention_bias = reader.get("attention_bias", bool, False)
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
            qkv_bias=attention_bias,
            o_bias=attention_bias,
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
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
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
    rope = config.get(key)
    if rope is None:
        return reader.get("rope_theta", float, 10000.0), None
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: {key}={rope!r} is not an object")
    inner = ConfigReader(rope, f"{where}: {key}")
    theta = inner.get("rope_theta", float, reader.get("rope_theta", float, 10000.0))
    inner.refuse_unless("partial_rotary_factor", float, 1.0, 1.0)
    rope_type = inner.get("rope_type", str, inner.get("type", str, "default"))
    if rope_type == "default":
        return theta, None
    fields = _ROPE_FIELDS.get(rope_type)
    if fields is None:
        raise CheckpointError(
            f"{where}: {key} of type {rope_type!r} is not supported; supported are {', '.join(_ROPE_FIELDS)}"
        )
    if unknown := sorted(name for name in rope if name not in _ROPE_COMMON | fields.keys()):
        raise CheckpointError(
            f"{where}: {key} of type {rope_type} has {unknown[0]}={rope[unknown[0]]!r}: not supported"
        )
    values = {name: inner.get(name, kind) for name, kind in fields.items()}
    return theta, RopeScaling(rope_type=rope_type, **values)  # type: ignore[arg-type]
