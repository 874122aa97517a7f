"""The writer of AWQ checkpoints: read back here and by Transformers' configuration, and all of it or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils.quantization_config import AwqConfig

from tests.checkpoints import make_llama_checkpoint
from tests.converted import assert_same, expected_tensors
from tests.test_quantized_checkpoints import dequantized
from tritonmind.checkpoints import awq_writer
from tritonmind.checkpoints.awq_writer import AwqCheckpointWriter
from tritonmind.checkpoints.reading import model_config, open_checkpoint
from tritonmind.errors import CheckpointError
from tritonmind.kernels.awq_format import AwqWeight, dequantize, quantize
from tritonmind.model_source import open_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source") / "tiny"
    make_llama_checkpoint(root, num_layers=11, dtype=torch.bfloat16, attention_bias=True)
    return root


def writer_to(destination: Path, source: Path, **changes: Any) -> AwqCheckpointWriter:
    """changes: of the model's configuration."""
    checkpoint = open_checkpoint(source)
    model = model_config(
        checkpoint, model_name="tiny", weight_type="int4", group_size=32, special_token_id=lambda role: None
    )
    return AwqCheckpointWriter(destination, dataclasses.replace(model, **changes), checkpoint)


def quantized(source: Path) -> dict[str, torch.Tensor | AwqWeight]:
    """What a quantiser hands over: 4-bit weights by module, everything else by name."""
    return {
        name.removesuffix(".weight") if name.endswith("_proj.weight") else name: (
            quantize(tensor, 32) if name.endswith("_proj.weight") else tensor
        )
        for name, tensor in load_file(source / "model.safetensors").items()
    }


def write(destination: Path, source: Path) -> dict[str, torch.Tensor | AwqWeight]:
    tensors = quantized(source)
    with writer_to(destination, source) as writer:
        size = writer.write({"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]})
        for i in range(11):
            layer = {name: tensor for name, tensor in tensors.items() if name.startswith(f"model.layers.{i}.")}
            size += writer.write(dict(sorted(layer.items(), reverse=True)))
        size += writer.write({name: tensors[name] for name in ("lm_head.weight", "model.norm.weight")})
        assert size == writer.num_bytes
        writer.commit()
    return tensors


@pytest.mark.parametrize("num_files", [1, 2])
def test_what_is_written_is_read_back(
    tmp_path: Path, source: Path, num_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "quant_output"
    if num_files > 1:
        monkeypatch.setattr(awq_writer, "MAX_SHARD_BYTES", 150_000)
    destination.mkdir()
    (destination / "inputs_stats.safetensors").write_text("not of the checkpoint")
    tensors = write(destination, source)
    assert len(list(destination.glob("model*.safetensors"))) == num_files
    assert (destination / "model.safetensors.index.json").is_file() == (num_files > 1)
    assert not list(destination.glob(".*"))
    state = {
        f"{name}.weight" if isinstance(tensor, AwqWeight) else name: (
            dequantize(tensor) if isinstance(tensor, AwqWeight) else tensor
        )
        for name, tensor in tensors.items()
    }
    read = open_model(destination)
    assert (read.model.weight_type, read.model.group_size, read.model.unquantized_type) == ("int4", 32, "bf16")
    assert_same(dequantized(dict(read.tensors(0))), expected_tensors(state, 11, 1, False))


def test_transformers_reads_the_configuration(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "quant_output", source)
    config = AutoConfig.from_pretrained(tmp_path / "quant_output")
    original = AutoConfig.from_pretrained(source)
    assert config.dtype == torch.bfloat16
    assert (config.num_hidden_layers, config.rope_parameters) == (11, original.rope_parameters)
    given = AwqConfig.from_dict(config.quantization_config)
    assert (given.bits, given.group_size, given.zero_point, given.format) == (4, 32, True, "gemm")
    assert AutoTokenizer.from_pretrained(tmp_path / "quant_output")("one")["input_ids"]
    generation = GenerationConfig.from_pretrained(tmp_path / "quant_output")
    assert generation.eos_token_id == GenerationConfig.from_pretrained(source).eos_token_id


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_new_checkpoint_replaces_the_old_one_when_it_is_complete(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "quant_output"
    with monkeypatch.context() as patch:
        patch.setattr(awq_writer, "MAX_SHARD_BYTES", 150_000)
        write(destination, source)
    before = names_in(destination)
    with pytest.raises(KeyboardInterrupt), writer_to(destination, source) as writer:
        writer.write({"model.embed_tokens.weight": torch.zeros(320, 64)})
        raise KeyboardInterrupt
    assert names_in(destination) == before
    write(destination, source)
    assert {name for name in names_in(destination) if name.startswith("model")} == {"model.safetensors"}
    assert open_model(destination).model.group_size == 32


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match="embed_tokens"), writer_to(tmp_path / "quant_output", source) as writer:
        writer.write({"model.embed_tokens.weight": torch.zeros(320, 64)})
        raise CheckpointError("model.embed_tokens.weight is not liked")
    assert names_in(tmp_path) == set()


def test_what_a_killed_writer_left_makes_room(tmp_path: Path, source: Path) -> None:
    left = tmp_path / "quant_output" / ".checkpoint.7.partial"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    write(tmp_path / "quant_output", source)
    assert not [name for name in names_in(tmp_path / "quant_output") if name.startswith(".")]


def test_a_value_that_fp16_cannot_hold(tmp_path: Path, source: Path) -> None:
    """No option of lite auto_awq helps, so none is named."""
    fp16 = writer_to(tmp_path / "quant_output", source, unquantized_type="fp16")
    problem = (
        r"^model\.embed_tokens\.weight holds values that fp16 cannot: .* serve this model as it is, in bf16 or fp32$"
    )
    with pytest.raises(CheckpointError, match=problem), fp16 as writer:
        writer.write({"model.embed_tokens.weight": torch.full((320, 64), 1e5)})


def test_directories_that_hold_something_else(tmp_path: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match="is where the model itself is: choose another directory"):
        writer_to(source, source)
    other = tmp_path / "other"
    make_llama_checkpoint(other)
    with pytest.raises(CheckpointError, match="other holds a checkpoint that is not one of AWQ"):
        writer_to(other, source)
    (other / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"other/model\.safetensors exists without config\.json: remove it"):
        writer_to(other, source)
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="file is no directory"):
        writer_to(tmp_path / "file", source)
