"""`weights/config.ini`: one [llama] section with the tutorial's keys, read strictly and written from the template.

Three kinds of key. Facts repeat model.json and must agree with it. Settings are the user's to edit. Fixed ones are
accepted with their one value, because files of other tools carry them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from tritonmind.config import CacheConfig, EngineConfig, ModelConfig, RopeScaling, SchedulerConfig
from tritonmind.errors import ConfigError

SECTION = "llama"
Value = int | float | str

FACTS: dict[str, Callable[[ModelConfig], Value]] = {
    "model_name": lambda model: model.model_name,
    "head_num": lambda model: model.num_heads,
    "kv_head_num": lambda model: model.num_kv_heads,
    "vocab_size": lambda model: model.vocab_size,
    "num_layer": lambda model: model.num_layers,
    "inter_size": lambda model: model.intermediate_size,
    "norm_eps": lambda model: model.norm_eps,
    "attn_bias": lambda model: int(model.attn_bias),
    "start_id": lambda model: model.bos_token_id,
    "end_id": lambda model: model.eos_token_ids[0],
    "weight_type": lambda model: model.weight_type,
    "rotary_embedding": lambda model: model.head_dim,
    "rope_theta": lambda model: model.rope_theta,
    "size_per_head": lambda model: model.head_dim,
    "group_size": lambda model: model.group_size,
    "max_position_embeddings": lambda model: model.max_position_embeddings,
}

# Key -> where it goes: a configuration class and its field. Defaults and types are the field's.
SETTINGS: dict[str, tuple[type, str]] = {
    "tensor_para_size": (EngineConfig, "tensor_parallel_size"),
    "session_len": (SchedulerConfig, "max_model_len"),
    "max_batch_size": (SchedulerConfig, "max_num_seqs"),
    "max_context_token_num": (SchedulerConfig, "max_num_batched_tokens"),
    "cache_max_entry_count": (CacheConfig, "cache_max_entry_count"),
    "cache_block_seq_len": (CacheConfig, "block_size"),
    "quant_policy": (CacheConfig, "quant_policy"),
}

FIXED = {"step_length": 1, "cache_chunk_size": 1, "use_context_fmha": 1}

ROPE_SCALING_FACTOR = "rope_scaling_factor"
USE_LOGN_ATTN = "use_logn_attn"
KEYS = (*FACTS, *SETTINGS, *FIXED, ROPE_SCALING_FACTOR, USE_LOGN_ATTN)

_KEY_LINE = re.compile(r"(\w+)\s*=[ \t]*(.*)")


class _Entry(typing.NamedTuple):
    text: str
    where: str  # file:line


def new_settings(*, session_len: int, tensor_parallel_size: int) -> dict[str, Any]:
    """The settings, as {field: value}, of a model that nobody has edited a config.ini for: the defaults and these."""
    defaults = {
        field.name: field.default
        for cls, name in SETTINGS.values()
        for field in dataclasses.fields(cls)
        if field.name == name and field.default is not dataclasses.MISSING
    }
    return {**defaults, "max_model_len": session_len, "tensor_parallel_size": tensor_parallel_size}


def render_config_ini(template: str, model: ModelConfig, *, session_len: int, tensor_parallel_size: int) -> str:
    """Fill the template for a new workspace: facts from the model, settings from the configuration's defaults."""
    values: dict[str, Value] = {key: fact(model) for key, fact in FACTS.items()}
    settings = new_settings(session_len=session_len, tensor_parallel_size=tensor_parallel_size)
    values |= {key: settings[name] for key, (_, name) in SETTINGS.items()}
    values |= {**FIXED, USE_LOGN_ATTN: int(model.use_logn_attn)}
    scaling = model.rope_scaling
    values[ROPE_SCALING_FACTOR] = scaling.factor if scaling and scaling.rope_type == "dynamic" else 0.0
    lines = []
    for line in template.splitlines():
        match = _KEY_LINE.fullmatch(line)
        lines.append(f"{match[1]} = {_format(values.pop(match[1]))}" if match else line)
    assert not values, f"the template lacks {sorted(values)}"
    return "\n".join(lines) + "\n"


def read_config_ini(path: Path, model: ModelConfig, model_source: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read `path` for a model whose facts came from `model_source`.

    Returns the model, with the rotary scaling and logn attention that the file asks for, and the settings as
    {field: value}.
    Raises ConfigError with file, line and values for anything unknown, missing, mistyped or contradictory.
    """
    entries = _parse(path)
    for key, fact in FACTS.items():
        entry, expected = entries[key], fact(model)
        if _typed(key, entry, type(expected)) != expected:
            raise ConfigError(
                f"{entry.where}: {key} = {entry.text}, but {model_source} says {_format(expected)}: "
                "it is a fact of the weights, so restore it or convert again"
            )
    for key, expected in FIXED.items():
        if _typed(key, entries[key], int) != expected:
            raise ConfigError(
                f"{entries[key].where}: {key} = {entries[key].text} is not supported: it must be {expected}"
            )
    logn = entries[USE_LOGN_ATTN]
    use_logn_attn = _typed(USE_LOGN_ATTN, logn, int)
    if use_logn_attn not in (0, 1):
        raise ConfigError(f"{logn.where}: {USE_LOGN_ATTN} = {logn.text} must be 0 or 1")
    settings = {}
    for key, (cls, name) in SETTINGS.items():
        settings[name] = _setting(key, entries[key], typing.get_type_hints(cls)[name])
    # The tutorial's 1 is a multiplier of its own batch arithmetic; the engine chooses for itself.
    if settings["max_num_batched_tokens"] == 1:
        settings["max_num_batched_tokens"] = 0
    model = dataclasses.replace(model, use_logn_attn=bool(use_logn_attn))
    return _with_dynamic_rope(model, entries[ROPE_SCALING_FACTOR]), settings


def build_engine_config(
    model: ModelConfig, settings: Mapping[str, Any], overrides: Mapping[str, Any], *, where: Path
) -> EngineConfig:
    """An EngineConfig from the file's settings and the caller's overrides, which win.

    Overrides are flat: field names of EngineConfig, CacheConfig and SchedulerConfig, or config.ini's names of them.
    Texts such as "4" or "true", as server parameters carry them, are converted. Raises ConfigError naming option and
    value.
    """
    hints = _flat_fields()
    chosen: dict[str, Any] = {}
    for option, value in overrides.items():
        name = SETTINGS[option][1] if option in SETTINGS else option
        if name not in hints:
            raise ConfigError(f"unknown option {option!r}; known options are {', '.join(sorted({*hints, *SETTINGS}))}")
        if name in chosen:
            raise ConfigError(f"option {option!r} is given twice, under two names")
        try:
            chosen[name] = msgspec.convert(value, hints[name], strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{option}={value!r} is invalid: {error}") from None
    stored_tp = settings["tensor_parallel_size"]
    tp = chosen.get("tensor_parallel_size", stored_tp)
    if tp != stored_tp:
        raise ConfigError(
            f"tensor_para_size={tp}, but the weights beside {where} are split for {stored_tp}: "
            f"convert again with --tp {tp}"
        )
    values = {**settings, **chosen}

    def take(cls: type) -> dict[str, Any]:
        return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}

    try:
        return EngineConfig(
            model=model,
            cache=CacheConfig(**take(CacheConfig)),
            scheduler=SchedulerConfig(**take(SchedulerConfig)),
            **take(EngineConfig),
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _flat_fields() -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for cls in (EngineConfig, CacheConfig, SchedulerConfig):
        hints |= typing.get_type_hints(cls)
    for nested in ("model", "cache", "scheduler"):
        del hints[nested]
    return hints


def _parse(path: Path) -> dict[str, _Entry]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    entries: dict[str, _Entry] = {}
    in_section = False
    for number, raw in enumerate(lines, start=1):
        line, where = raw.strip(), f"{path}:{number}"
        if not line or line[0] in "#;":
            continue
        if line.startswith("["):
            if line != f"[{SECTION}]" or in_section:
                raise ConfigError(f"{where}: section {line} is not expected: the file has the one section [{SECTION}]")
            in_section = True
            continue
        match = _KEY_LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"{where}: {line!r} is not of the form key = value")
        key, text = match[1], match[2].strip()
        if not in_section:
            raise ConfigError(f"{where}: {key} stands before the section [{SECTION}]")
        if key not in KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}; known keys are {', '.join(KEYS)}")
        if key in entries:
            raise ConfigError(f"{where}: {key} was already set at {entries[key].where}")
        entries[key] = _Entry(text, where)
    missing = [key for key in KEYS if key not in entries]
    if missing:
        raise ConfigError(f"{path}: key {missing[0]!r} is missing from section [{SECTION}]")
    return entries


def _typed(key: str, entry: _Entry, kind: type) -> Value:
    if kind is str:
        return entry.text
    pattern, noun = (r"[+-]?\d+", "an integer") if kind is int else (r"[+-]?[\d.]+([eE][+-]?\d+)?", "a number")
    try:
        if re.fullmatch(pattern, entry.text) and math.isfinite(value := kind(entry.text)):
            return value
    except ValueError:
        pass
    raise ConfigError(f"{entry.where}: {key} = {entry.text} must be {noun}")


def _setting(key: str, entry: _Entry, hint: Any) -> Any:
    value = _typed(key, entry, float if hint is float else int)
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        _refuse_choice(key, entry, hint)


def _refuse_choice(key: str, entry: _Entry, hint: Any) -> NoReturn:
    raise ConfigError(f"{entry.where}: {key} = {entry.text} must be one of {', '.join(str(int(v)) for v in hint)}")


def _with_dynamic_rope(model: ModelConfig, entry: _Entry) -> ModelConfig:
    factor = _typed(ROPE_SCALING_FACTOR, entry, float)
    assert isinstance(factor, float)
    if factor != 0 and factor < 1:
        raise ConfigError(
            f"{entry.where}: {ROPE_SCALING_FACTOR} = {entry.text} must be 0 (off) or at least 1 (dynamic NTK scaling)"
        )
    scaling = model.rope_scaling
    if scaling is not None and scaling.rope_type != "dynamic":
        if factor:
            raise ConfigError(
                f"{entry.where}: {ROPE_SCALING_FACTOR} = {entry.text} cannot be combined with the {scaling.rope_type} "
                "scaling that the checkpoint was trained with: set it to 0"
            )
        return model
    wanted = RopeScaling(rope_type="dynamic", factor=factor) if factor else None
    if scaling is not None and factor:
        wanted = dataclasses.replace(scaling, factor=factor)
    return dataclasses.replace(model, rope_scaling=wanted)


def _format(value: Value) -> str:
    return str(int(value)) if isinstance(value, int) else str(value)
