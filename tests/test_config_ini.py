"""config.ini: the template against the code's defaults, and every kind of wrong line by file, line and value."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from tritonmind.config import CacheConfig, EngineConfig, ModelConfig, QuantPolicy, RopeScaling, SchedulerConfig
from tritonmind.config_ini import FACTS, FIXED, KEYS, SETTINGS, build_engine_config, read_config_ini, render_config_ini
from tritonmind.errors import ConfigError
from tritonmind.resources import resource

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    model_name="tiny-1.0",
    vocab_size=1000,
    hidden_size=96,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=130,
    norm_eps=9.999999747378752e-06,
    rope_theta=500000.0,
    max_position_embeddings=4096,
    weight_type="bf16",
    bos_token_id=1,
    eos_token_ids=(7, 9),
)
MODEL_JSON = Path("model.json")


def template() -> str:
    return resource("model_repository/tritonmind/1/weights/config.ini").read_text(encoding="utf-8")


def write(directory: Path, model: ModelConfig = MODEL, **changes: str | None) -> Path:
    """A valid config.ini with `changes` to its values; None removes the key."""
    lines = []
    for line in render_config_ini(template(), model, session_len=2048, tensor_parallel_size=2).splitlines():
        key = line.partition(" =")[0]
        if key not in changes:
            lines.append(line)
        elif changes[key] is not None:
            lines.append(f"{key} = {changes[key]}")
    path = directory / "config.ini"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def line_of(path: Path, key: str) -> str:
    numbers = [n for n, line in enumerate(path.read_text().splitlines(), 1) if line.startswith(f"{key} =")]
    return f"{path}:{numbers[0]}: "


def read(path: Path, model: ModelConfig = MODEL) -> tuple[ModelConfig, dict[str, Any]]:
    return read_config_ini(path, model, MODEL_JSON)


def test_template_has_every_key_once_with_the_codes_default() -> None:
    found = {}
    for line in template().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            assert key.strip() not in found
            found[key.strip()] = value.strip()
    assert sorted(found) == sorted(KEYS)
    for key, (cls, name) in SETTINGS.items():
        default = next(field.default for field in dataclasses.fields(cls) if field.name == name)
        assert found[key] == ("" if default is dataclasses.MISSING else str(default).lower())
    assert {key: found[key] for key in FIXED} == {key: str(value) for key, value in FIXED.items()}


def test_round_trip(tmp_path: Path) -> None:
    model, settings = read(write(tmp_path))
    assert model == MODEL
    engine = build_engine_config(model, settings, {}, where=tmp_path)
    assert engine == EngineConfig(
        model=MODEL, cache=CacheConfig(), scheduler=SchedulerConfig(max_model_len=2048), tensor_parallel_size=2
    )


def test_settings_of_the_tutorial_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, max_context_token_num="1", cache_max_entry_count="0.5", quant_policy="4", session_len="2056")
    engine = build_engine_config(*read(path), {}, where=path)
    assert engine.scheduler.max_num_batched_tokens == 0
    assert engine.cache.cache_max_entry_count == 0.5
    assert engine.cache.quant_policy is QuantPolicy.KV_INT8_CALIBRATED
    assert engine.scheduler.max_model_len == 2056


@pytest.mark.parametrize("key", KEYS)
def test_missing_key(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, **{key: None})
    with pytest.raises(ConfigError) as error:
        read(path)
    assert str(path) in str(error.value) and f"'{key}' is missing" in str(error.value)


@pytest.mark.parametrize(
    ("key", "text", "problem"),
    [
        ("head_num", "7", "head_num = 7, but model.json says 6"),
        ("norm_eps", "1e-6", "norm_eps = 1e-6, but model.json says 9.999999747378752e-06"),
        ("rope_theta", "10000", "rope_theta = 10000, but model.json says 500000.0"),
        ("model_name", "llama2", "model_name = llama2, but model.json says tiny-1.0"),
        ("weight_type", "fp16", "weight_type = fp16, but model.json says bf16"),
        ("end_id", "9", "end_id = 9, but model.json says 7"),
        ("vocab_size", "many", "vocab_size = many must be an integer"),
        ("session_len", "2048.5", "session_len = 2048.5 must be an integer"),
        ("session_len", "1_000", "session_len = 1_000 must be an integer"),
        ("max_batch_size", "", "max_batch_size =  must be an integer"),
        ("cache_max_entry_count", "nan", "cache_max_entry_count = nan must be a number"),
        ("cache_max_entry_count", "1e999", "cache_max_entry_count = 1e999 must be a number"),
        ("quant_policy", "5", "quant_policy = 5 must be one of 0, 4, 8"),
        ("step_length", "2", "step_length = 2 is not supported: it must be 1"),
        ("cache_chunk_size", "-1", "cache_chunk_size = -1 is not supported: it must be 1"),
        ("use_context_fmha", "0", "use_context_fmha = 0 is not supported: it must be 1"),
        ("use_logn_attn", "2", "use_logn_attn = 2 must be 0 or 1"),
        ("rope_scaling_factor", "0.5", "rope_scaling_factor = 0.5 must be 0 (off) or at least 1"),
        ("rope_scaling_factor", "-2", "rope_scaling_factor = -2 must be 0 (off) or at least 1"),
    ],
)
def test_wrong_value_is_named_with_its_line(tmp_path: Path, key: str, text: str, problem: str) -> None:
    path = write(tmp_path, **{key: text})
    with pytest.raises(ConfigError) as error:
        read(path)
    assert str(error.value).startswith(line_of(path, key) + problem)


@pytest.mark.parametrize(
    ("addition", "problem"),
    [
        ("tp = 1", "unknown key 'tp'"),
        ("head_num = 6", "head_num was already set at "),
        ("[other]", "section [other] is not expected"),
        ("[llama]", "section [llama] is not expected"),
        ("nonsense", "'nonsense' is not of the form key = value"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, addition: str, problem: str) -> None:
    path = write(tmp_path)
    number = len(path.read_text().splitlines()) + 1
    path.write_text(path.read_text() + addition + "\n")
    with pytest.raises(ConfigError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:{number}: {problem}")


def test_key_before_the_section(tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    path.write_text("head_num = 6\n[llama]\n")
    with pytest.raises(ConfigError, match=r"config\.ini:1: head_num stands before the section \[llama\]"):
        read(path)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config\.ini cannot be read"):
        read(path)


def test_dynamic_rope_follows_the_file(tmp_path: Path) -> None:
    dynamic = dataclasses.replace(MODEL, rope_scaling=RopeScaling(rope_type="dynamic", factor=4.0))
    assert read(write(tmp_path, dynamic), dynamic)[0] == dynamic
    assert read(write(tmp_path, dynamic, rope_scaling_factor="0"), dynamic)[0].rope_scaling is None
    assert read(write(tmp_path, rope_scaling_factor="2.5"))[0].rope_scaling == RopeScaling(
        rope_type="dynamic", factor=2.5
    )


def test_logn_attention_follows_the_file(tmp_path: Path) -> None:
    logn = dataclasses.replace(MODEL, use_logn_attn=True)
    assert read(write(tmp_path, logn), logn)[0] == logn
    assert read(write(tmp_path, logn, use_logn_attn="0"), logn)[0] == MODEL
    assert read(write(tmp_path, use_logn_attn="1"))[0] == logn


def test_rope_of_the_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    llama3 = dataclasses.replace(
        MODEL,
        rope_scaling=RopeScaling(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    )
    assert read(write(tmp_path, llama3), llama3)[0] == llama3
    path = write(tmp_path, llama3, rope_scaling_factor="2.0")
    with pytest.raises(ConfigError, match=r"rope_scaling_factor = 2\.0 cannot be combined with the llama3 scaling"):
        read(path, llama3)


def test_overrides_by_either_name_and_as_text(tmp_path: Path) -> None:
    path = write(tmp_path)
    options = {"device": "cpu", "num_threads": "2", "session_len": "99", "max_num_seqs": 3, "enforce_eager": "true"}
    engine = build_engine_config(*read(path), options, where=path)
    assert (engine.device, engine.num_threads, engine.enforce_eager) == ("cpu", 2, True)
    assert (engine.scheduler.max_model_len, engine.scheduler.max_num_seqs) == (99, 3)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"threads": 2}, "unknown option 'threads'"),
        ({"model": MODEL}, "unknown option 'model'"),
        ({"device": "tpu"}, "device='tpu' is invalid"),
        ({"num_threads": "two"}, "num_threads='two' is invalid"),
        ({"session_len": 9, "max_model_len": 9}, "'max_model_len' is given twice"),
        ({"max_batch_size": 0}, "max_batch_size=0 must be at least 1"),
        ({"session_len": 1}, "session_len=1 must be at least 2"),
        ({"block_size": 48}, "cache_block_seq_len=48 must be a power of two"),
        ({"cache_max_entry_count": "inf"}, "cache_max_entry_count=inf must be positive and finite"),
        ({"cache_max_entry_count": "nan"}, "cache_max_entry_count=nan must be positive and finite"),
        ({"cache_max_entry_count": -0.5}, "cache_max_entry_count=-0.5 must be positive and finite"),
        ({"num_threads": "-1"}, "num_threads=-1 must be 0 (torch's choice) or positive"),
        ({"tensor_parallel_size": 1}, "are split for 2: convert again with --tp 1"),
    ],
)
def test_wrong_override_is_named(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    path = write(tmp_path)
    with pytest.raises(ConfigError) as error:
        build_engine_config(*read(path), options, where=path)
    assert problem in str(error.value)


def type_of(key: str) -> type:
    if key in FACTS:
        return type(FACTS[key](MODEL))
    if key in SETTINGS:
        cls, name = SETTINGS[key]
        return float if typing.get_type_hints(cls)[name] is float else int
    return float if key == "rope_scaling_factor" else int


def test_the_reference_page_lists_every_key_as_it_is() -> None:
    """docs/config.md: in the file's order, with kind, type and default of the code."""
    page = (Path(__file__).parent.parent / "docs" / "config.md").read_text(encoding="utf-8")
    table = page.partition("| key | kind | type | default | effect |\n")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    written = render_config_ini(template(), MODEL, session_len=2048, tensor_parallel_size=1)
    values = dict(line.split(" = ") for line in written.splitlines() if " = " in line and not line.startswith("#"))
    assert [row[0].strip("`") for row in rows] == list(values)
    for key, kind, noun, default, effect in rows:
        name = key.strip("`")
        assert kind == ("fact" if name in FACTS else "fixed" if name in FIXED else "setting"), key
        assert noun == {str: "text", int: "integer", float: "number"}[type_of(name)], key
        assert effect
        if default.startswith("`"):
            assert default.strip("`") == values[name], key
        else:
            assert default in ("checkpoint", "MODEL_NAME of `convert`"), key
