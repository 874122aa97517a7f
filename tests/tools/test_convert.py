"""`tritonmind convert`: the command, the files of a checkpoint, and each wrong one named."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import make_llama_checkpoint
from tests.converted import assert_same, expected_tensors, read_all

from tritonmind.checkpoints import gguf_checkpoint, hf_checkpoint
from tritonmind.checkpoints.hf_checkpoint import HfCheckpoint
from tritonmind.checkpoints.plan import conversion_plan
from tritonmind.errors import CheckpointError, ConfigError, TritonmindError, WorkspaceError
from tritonmind.tensor_layout import common_tensor_specs, tensor_specs
from tritonmind.workspace import Workspace
from tritonmind_tools.cli import main
from tritonmind_tools.convert import convert


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "checkpoint"
    make_llama_checkpoint(root, shards=3)
    return root


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def refused(checkpoint: Path, kind: type[TritonmindError] = CheckpointError, **options: Any) -> str:
    """The message of a conversion that must fail and leave nothing behind."""
    destination = checkpoint.parent / "workspace"
    with pytest.raises(kind) as error:
        convert(options.pop("model_name", "tiny"), checkpoint, destination, **options)
    assert not any("workspace" in path.name for path in checkpoint.parent.iterdir())
    return str(error.value)


def single_file(checkpoint: Path) -> Path:
    """Merge the shards of a checkpoint into one model.safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    return checkpoint / "model.safetensors"


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 7.0}, None),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, ("linear", 2.0)),
        ({"rope_theta": 7.0, "rope_scaling": {"rope_type": "dynamic", "factor": 4}}, ("dynamic", 4.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 7.0}}, ("linear", 3.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, None),
    ],
)
def test_rotary_settings_of_either_transformers(
    checkpoint: Path, rope: dict[str, Any], expected: tuple[str, float] | None
) -> None:
    edit(checkpoint / "config.json", **{"rope_parameters": None, **rope})
    model = convert("tiny", checkpoint, checkpoint.parent / "workspace")
    assert model.rope_theta == 7.0
    scaling = model.rope_scaling
    assert (scaling and (scaling.rope_type, scaling.factor)) == expected
    Workspace.open(checkpoint.parent / "workspace")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM is not supported; supported are LlamaForCausalLM, MistralForCausalLM",
        ),
        ({"architectures": None}, "architectures=None does not name one architecture"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size='64' is not of type int"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True is not of type int"),
        ({"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"num_attention_heads": 0}, "num_heads=0 must be positive"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True asks for biases in the MLP, which is not supported"),
        ({"kv_lora_rank": 512}, "kv_lora_rank=512 asks for multi-head latent attention (MLA), which is not supported"),
        ({"num_local_experts": 8}, "num_local_experts=8 asks for a mixture of experts (MoE)"),
        ({"alibi": True}, "alibi=True asks for ALiBi positions"),
        ({"attention_sinks": 4}, "attention_sinks=4 asks for attention sinks"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 asks for softcapping of attention scores"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 asks for rotary embedding of a part of each head"),
        ({"vision_config": {"depth": 2}}, "asks for images, sound or video"),
        ({"sliding_window": 64}, "a sliding window (sliding_window=64, layer_types=[]) is not one of LlamaForCausalLM"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "1 of 2 layers have a sliding window, which is not supported: all layers must have one, or none",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "layer_types": ["linear_attention"] * 2},
            "layer_types: layers of type 'linear_attention' are not supported",
        ),
        ({"architectures": ["InternLM3ForCausalLM"], "bias": True}, "mlp_bias=True asks for biases in the MLP"),
        (
            {"architectures": ["BaichuanForCausalLM"], "hidden_size": 5120},
            "ALiBi positions (Baichuan 13B) is not supported",
        ),
        ({"architectures": ["BaichuanForCausalLM"], "tie_word_embeddings": True}, "tie_word_embeddings=True is not"),
        ({"architectures": ["InternLMForCausalLM"], "rotary": {"type": "xpos"}}, "rotary={'type': 'xpos'} is not"),
        (
            {"architectures": ["QWenLMHeadModel"], "no_bias": False},
            "no_bias=False (biases in attention output and MLP)",
        ),
        (
            {"architectures": ["QWenLMHeadModel"], "intermediate_size": 97},
            "intermediate_size=97, which must be an even",
        ),
        ({"quantization_config": [4]}, "quantization_config=[4] is not an object"),
        (
            {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}},
            "type 'proportional' is not supported; supported are linear, dynamic, llama3, yarn, longrope",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_parameters: low_freq_factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 1}}, "mscale=1: not supported"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "mrope_section=[2, 3, 3]: not"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 0.5}}, "rope_scaling: factor=0.5 must be at least 1"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 64,
                    "factor": 2.0,
                    "short_factor": [1.0],
                    "long_factor": [1.0] * 8,
                }
            },
            "short_factor has 1 values, not head_dim / 2",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": [1]}, "rope_parameters=[1] is not an object"),
        ({"intermediate_size": 97}, "has shape [96, 64], config.json asks for [97, 64]"),
        ({"attention_bias": True}, "self_attn.q_proj.bias is missing"),
    ],
)
def test_config_that_cannot_be_served(checkpoint: Path, changes: dict[str, Any], problem: str) -> None:
    edit(checkpoint / "config.json", **changes)
    message = refused(checkpoint)
    assert problem in message and str(checkpoint) in message


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    message = refused(tmp_path / "org-model")
    assert "org-model does not exist" in message and "a name on the Hugging Face hub" in message


@pytest.mark.parametrize("operation", ["open", "exists"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_path_that_may_not_be_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, operation: str, name: str
) -> None:
    """Simulated: to root every file is readable."""
    single_file(checkpoint)
    (checkpoint / "model.gguf").write_bytes(b"GGUF")
    given = checkpoint if name == "model.safetensors" else checkpoint / name
    forbidden = given if operation == "exists" else checkpoint / name
    original = getattr(Path, operation)

    def forbid(path: Path, *args: Any, **options: Any) -> Any:
        if path == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(Path, operation, forbid)
    with pytest.raises(CheckpointError) as error:
        convert("tiny", given, checkpoint.parent / "workspace")
    assert str(error.value) == f"{forbidden} cannot be read: Permission denied"


def test_path_that_is_no_checkpoint(checkpoint: Path) -> None:
    assert "config.json is neither a directory nor a .gguf file" in refused(checkpoint / "config.json")
    convert("tiny", checkpoint, checkpoint.parent / "made")
    assert "made is a workspace already: serve it" in refused(checkpoint.parent / "made")
    (checkpoint / "config.json").unlink()
    assert f"{checkpoint} has no config.json" in refused(checkpoint)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_config_that_is_no_json_object(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    assert f"{checkpoint / 'config.json'} " in refused(checkpoint)


def test_pickle_checkpoint_is_told_how_to_convert(tmp_path: Path) -> None:
    make_llama_checkpoint(tmp_path / "checkpoint", safe_serialization=False)
    message = refused(tmp_path / "checkpoint")
    assert "only as pickle (pytorch_model.bin)" in message and "--allow-pickle" in message


def test_no_weights_at_all(checkpoint: Path) -> None:
    single_file(checkpoint).unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(checkpoint)


def test_single_file(checkpoint: Path) -> None:
    expected = {**HfCheckpoint(checkpoint).tensors}
    file = single_file(checkpoint)
    found = HfCheckpoint(checkpoint).tensors
    assert found.keys() == expected.keys() and {tensor.file for tensor in found.values()} == {file}
    convert("tiny", checkpoint, checkpoint.parent / "workspace", weight_type="fp32")
    assert_same(read_all(checkpoint.parent / "workspace"), expected_tensors(load_file(file), 2, 1, False))


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_file(checkpoint: Path, kept: int) -> None:
    file = single_file(checkpoint)
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    assert f"{file} is damaged or truncated" in refused(checkpoint)


def test_missing_shard(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard} is missing, but model.safetensors.index.json names it" in refused(checkpoint)


@pytest.mark.parametrize("name", ["../outside.safetensors", 3])
def test_shard_index_that_leaves_the_directory(checkpoint: Path, name: Any) -> None:
    edit(checkpoint / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    assert f"{name!r}, the file of model.norm.weight, is no plain file name" in refused(checkpoint)


def test_shard_index_that_disagrees_with_the_files(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    file = weight_map["model.norm.weight"]
    edit(index, weight_map={**weight_map, "model.spare": file})
    assert f"{file}: tensor model.spare: it is not in the file" in refused(checkpoint)
    del weight_map["model.norm.weight"]
    edit(index, weight_map=weight_map)
    assert f"{file}: tensor model.norm.weight: model.safetensors.index.json does not list it" in refused(checkpoint)


def change_tensors(checkpoint: Path, changes: dict[str, torch.Tensor | None]) -> None:
    file = single_file(checkpoint)
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        ({"lm_head.weight": None}, "tensor lm_head.weight is missing"),
        ({"model.layers.2.spare": torch.zeros(1)}, "tensor model.layers.2.spare is not one of LlamaForCausalLM"),
        ({"model.norm.weight": torch.zeros(64, dtype=torch.float64)}, "tensor model.norm.weight is F64, not one of"),
        (
            {"model.norm.weight": torch.zeros(8, 8)},
            "tensor model.norm.weight has shape [8, 8], config.json asks for [64]",
        ),
    ],
)
def test_wrong_tensors(checkpoint: Path, changes: dict[str, torch.Tensor | None], problem: str) -> None:
    change_tensors(checkpoint, changes)
    assert problem in refused(checkpoint)


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(checkpoint: Path) -> None:
    change_tensors(checkpoint, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    convert("tiny", checkpoint, checkpoint.parent / "workspace")


def test_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    embedding = make_llama_checkpoint(checkpoint, tie=True).state_dict()["model.embed_tokens.weight"]
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    other = embedding.clone()
    other[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": other}, file)
    assert "tie_word_embeddings is true, but lm_head.weight is not the same as" in refused(checkpoint)
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file)
    convert("tiny", checkpoint, tmp_path / "workspace", weight_type="fp32")
    assert "output.weight" not in read_all(tmp_path / "workspace")


def test_fp16_overflow_is_named(checkpoint: Path) -> None:
    tensors = load_file(single_file(checkpoint))
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, checkpoint / "model.safetensors")
    assert "norm.weight holds values that fp16 cannot: convert with --weight-type bf16" in refused(checkpoint)


@pytest.mark.parametrize(("tp", "named"), [(3, "head_num=4"), (4, "kv_head_num=2"), (0, "tensor_para_size=0")])
def test_ranks_that_do_not_divide_the_heads(checkpoint: Path, tp: int, named: str) -> None:
    assert named in refused(checkpoint, ConfigError, tp=tp)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-x", "a\nb = 1"])
def test_model_name_that_would_not_fit_the_file(checkpoint: Path, name: str) -> None:
    assert "MODEL_NAME" in refused(checkpoint, ConfigError, model_name=name)


def test_destination_is_refused_before_the_work(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_checkpoint, "HfCheckpoint", None)
    with pytest.raises(WorkspaceError, match="exists and is no workspace"):
        convert("tiny", checkpoint, checkpoint, force=True)
    assert (checkpoint / "config.json").is_file()


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, True, (5, 6, 2)),
        ({"eos_token_id": None}, {"eos_token_id": [7]}, True, (7, 2)),
        (None, {"eos_token_id": None}, True, (2,)),
    ],
)
def test_source_of_eos(
    checkpoint: Path,
    generation: dict[str, Any] | None,
    config: dict[str, Any],
    tokenizer: bool,
    expected: tuple[int, ...],
) -> None:
    """The tokenizer's own, 2, is always one: there is a chat template."""
    set_eos(checkpoint, generation, config, tokenizer)
    assert convert("tiny", checkpoint, checkpoint.parent / "workspace").eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"eos_token_id": None}, "eos_token_id is neither there nor in generation_config.json nor in the tokenizer"),
        ({"eos_token_id": 320}, "token id 320 (bos or eos) is not below vocab_size=320"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' is neither a token id nor a list of them"),
    ],
)
def test_wrong_eos(checkpoint: Path, config: dict[str, Any], problem: str) -> None:
    set_eos(checkpoint, None, config, False)
    assert problem in refused(checkpoint)


def set_eos(checkpoint: Path, generation: dict[str, Any] | None, config: dict[str, Any], tokenizer: bool) -> None:
    if generation is None:
        (checkpoint / "generation_config.json").unlink()
    else:
        edit(checkpoint / "generation_config.json", **generation)
    edit(checkpoint / "config.json", **config)
    if not tokenizer:
        edit(checkpoint / "tokenizer_config.json", eos_token=None)


def test_tokenizer_path(checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "tokenizer"
    elsewhere.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.move(checkpoint / name, elsewhere / name)
    assert f"{checkpoint} has none of tokenizer.json, tokenizer.model, qwen.tiktoken" in refused(checkpoint)
    assert "nowhere does not exist" in refused(checkpoint, tokenizer_path=tmp_path / "nowhere")
    for given in (elsewhere, elsewhere / "tokenizer.json"):
        convert("tiny", checkpoint, tmp_path / "workspace", tokenizer_path=given, force=True)
        found = Workspace.open(tmp_path / "workspace").tokenizer_dir
        assert (found / "tokenizer.json").read_bytes() == (elsewhere / "tokenizer.json").read_bytes()
    (elsewhere / "tokenizer.json").write_text("{}")
    shutil.rmtree(tmp_path / "workspace")
    assert f"{elsewhere / 'tokenizer.json'} is not a tokenizer" in refused(checkpoint, tokenizer_path=elsewhere)


def test_no_more_than_one_shard_is_open(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory: one mapped shard at a time, and parts no larger than their own rank's."""
    source = HfCheckpoint(checkpoint)
    model = convert("tiny", checkpoint, checkpoint.parent / "workspace", tp=2)
    largest = 0
    for step in conversion_plan(model, 2):
        for part in step.parts:
            largest = max(largest, source.read(*part).nbytes)
            mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(checkpoint) in line]
            assert len({line.split()[-1] for line in mapped}) <= 1
    assert largest == max(spec.num_bytes * 2 for spec in common_tensor_specs(model).values())


def test_plan_covers_the_layout_in_file_order(checkpoint: Path) -> None:
    model = convert("tiny", checkpoint, checkpoint.parent / "workspace", tp=2)
    targets = [step.target for step in conversion_plan(model, 2)]
    groups = [common_tensor_specs(model), tensor_specs(model, 2, 0), tensor_specs(model, 2, 1)]
    for specs in groups:
        assert [target for target in targets if target in specs] == list(specs)
    assert len(targets) == len(set(targets)) == sum(len(specs) for specs in groups)


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = tmp_path / "workspace"
    options = ["--dst_path", str(destination), "--model_format", "hf", "--weight-type", "bf16", "--triton_batch_dim"]
    assert main(["convert", "tiny", str(checkpoint), *options, "--tp", "2"]) == 0
    assert f"{destination}: LlamaForCausalLM, 2 layers, bf16, tp 2" in capsys.readouterr().out
    assert "max_batch_size: 1" in (destination / "model_repository/tritonmind/config.pbtxt").read_text()
    assert main(["convert", "tiny", str(checkpoint), *options]) == 1
    assert "is a workspace already: --force replaces it" in capsys.readouterr().err
    assert main(["convert", "tiny", str(checkpoint), *options, "--force"]) == 0


def test_gguf_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGML")
    assert "model.gguf is no GGUF file" in refused(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf cannot be loaded by Transformers" in refused(tmp_path / "model.gguf")


def test_gguf_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_checkpoint.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    assert "needs the package gguf: pip install 'tritonmind[gguf]'" in refused(tmp_path / "model.gguf")
