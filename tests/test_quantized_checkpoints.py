"""Checkpoints with 4-bit weights: the workspace holds what they mean, exactly, and each wrong one is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_llama_checkpoint
from tests.converted import assert_same, expected_tensors, read_all
from tests.quantized_checkpoints import GROUP_SIZE, make_quantized
from tritonmind.errors import CheckpointError, ConfigError, TritonmindError
from tritonmind.kernels.awq_format import AwqWeight, dequantize, quantize
from tritonmind.model_source import open_model
from tritonmind.workspace import Workspace
from tritonmind_tools.convert import convert


def dequantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A workspace's tensors, those of a 4-bit weight replaced by the weight in fp32."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((".qweight", ".qzeros", ".scales"))}
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            parts = (tensors[f"{module}.{kind}"] for kind in ("qweight", "qzeros", "scales"))
            plain[f"{module}.weight"] = dequantize(AwqWeight(*parts))
    return plain


SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2},
    "mha, bias, bf16": {"num_kv_heads": 4, "attention_bias": True, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_workspace_means_what_the_checkpoint_means(tmp_path: Path, method: str, tp: int, shape: str) -> None:
    options = {"intermediate": 128, **SHAPES[shape]}
    state = make_quantized(tmp_path / "checkpoint", method, **options)
    model = convert("tiny", tmp_path / "checkpoint", tmp_path / "workspace", tp=tp)
    assert (model.weight_type, model.group_size) == ("int4", GROUP_SIZE)
    assert model.unquantized_type == ("bf16" if "bf16" in shape else "fp16")
    assert_same(dequantized(read_all(tmp_path / "workspace")), expected_tensors(state, 2, tp, False))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {}),
        ("gptq", {"symmetric": True}),
        ("gptq", {"zero_offset": 0, "quantization_config": {"checkpoint_format": "gptq_v2"}}),
        ("gptq", {"quantization_config": {"desc_act": True}}),
        ("awq", {"group_size": 64, "intermediate": 128, "tie": True}),
    ],
)
def test_an_open_checkpoint_is_the_workspace(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    state = make_quantized(tmp_path / "tiny", method, **options)
    source = open_model(tmp_path / "tiny")
    tied = options.get("tie", False)
    assert_same(dequantized(dict(source.tensors(0))), expected_tensors(state, 2, 1, tied))
    convert("tiny", tmp_path / "tiny", tmp_path / "workspace", model_format=method, group_size=source.model.group_size)
    workspace = Workspace.open(tmp_path / "workspace")
    assert workspace.model == source.model
    assert workspace.engine_config() == source.engine_config()
    assert_same(dict(workspace.tensors(0)), dict(source.tensors(0)))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_checkpoint_whose_configuration_is_elsewhere(tmp_path: Path, method: str) -> None:
    """AutoGPTQ's quantize_config.json, and LMDeploy's AWQ checkpoints, which have none."""
    path = tmp_path / "checkpoint"
    state = make_quantized(path, method)
    config = json.loads((path / "config.json").read_text())
    given = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    if method == "gptq":
        del given["quant_method"]
        (path / "quantize_config.json").write_text(json.dumps(given))
    convert("tiny", path, tmp_path / "workspace", model_format=method, group_size=GROUP_SIZE)
    assert_same(dequantized(read_all(tmp_path / "workspace")), expected_tensors(state, 2, 1, False))
    if method == "gptq":
        (path / "quantize_config.json").unlink()
        assert open_model(path).model.group_size == GROUP_SIZE


def test_the_command_of_the_tutorial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tritonmind_tools.cli import main

    make_quantized(tmp_path / "quant_output", "awq")
    options = ["--model-format", "awq", "--group-size", "32", "--dst_path", str(tmp_path / "workspace_quant")]
    assert main(["convert", "llama2", str(tmp_path / "quant_output"), *options]) == 0
    assert "int4 in groups of 32, tp 1" in capsys.readouterr().out
    assert Workspace.open(tmp_path / "workspace_quant").model.model_name == "llama2"


@pytest.mark.parametrize("tp", [1, 2])
def test_rounding_while_converting(tmp_path: Path, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonmind.checkpoints.int4_readers._ROUNDED_ROWS", 24)
    model = make_llama_checkpoint(tmp_path / "checkpoint", intermediate=128, dtype=torch.bfloat16)
    convert("tiny", tmp_path / "checkpoint", tmp_path / "workspace", tp=tp, weight_type="int4", group_size=32)
    state = {
        name: dequantize(quantize(tensor, 32)) if name.endswith("_proj.weight") else tensor
        for name, tensor in model.state_dict().items()
    }
    assert_same(dequantized(read_all(tmp_path / "workspace")), expected_tensors(state, 2, tp, False))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    make_llama_checkpoint(root / "hf")
    make_quantized(root / "awq", "awq")
    make_quantized(root / "gptq", "gptq", symmetric=True)
    return root


def refused(path: Path, kind: type[TritonmindError] = CheckpointError, **options: Any) -> str:
    """The message of a conversion that must fail and leave nothing behind."""
    with pytest.raises(kind) as error:
        convert("tiny", path, path.parent / "workspace", **options)
    assert {entry.name for entry in path.parent.iterdir()} == {path.name}
    return str(error.value)


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine / request.param, tmp_path / request.param))


@pytest.mark.parametrize(
    ("checkpoint", "changes", "problem"),
    [
        (
            "awq",
            {"quant_method": "bitsandbytes"},
            "quant_method='bitsandbytes' is not supported; supported are awq and",
        ),
        ("awq", {"quant_method": None}, "quant_method is missing"),
        ("awq", {"bits": 8}, "bits=8 is not supported: only 4 is"),
        ("gptq", {"bits": 3}, "bits=3 is not supported: only 4 is"),
        ("awq", {"version": "gemv_fast"}, "version='gemv_fast' is not supported: only 'gemm' is"),
        ("awq", {"version": "GEMV"}, "version='GEMV' is not supported: only 'gemm' is"),
        ("awq", {"backend": "llm-awq"}, "backend='llm-awq' is not supported"),
        ("awq", {"zero_point": False}, "zero_point=False is not supported: only True is"),
        ("awq", {"group_size": -1}, "group_size=-1 must be one of 32, 64, 128"),
        ("awq", {"group_size": 64}, "group_size=64 does not divide intermediate_size=96: use 32"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not supported; supported are gptq, "),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format=True is not supported"),
        ("gptq", {"lm_head": True}, "lm_head=True is not supported"),
        ("gptq", {"dynamic": {"-:.*down.*": {}}}, "dynamic={'-:.*down.*': {}} is not supported"),
    ],
    indirect=["checkpoint"],
)
def test_a_quantisation_that_is_not_supported(checkpoint: Path, changes: dict[str, Any], problem: str) -> None:
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    given = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in given.items() if value is not None}
    file.write_text(json.dumps(config))
    message = refused(checkpoint)
    assert problem in message and str(file) in message


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("checkpoint", "changes", "problem"),
    [
        (
            "awq",
            {"qweight": lambda t: t[:-1].clone()},
            f"{DOWN}.qweight has shape [95, 8], config.json asks for [96, 8]",
        ),
        (
            "gptq",
            {"qweight": lambda t: t[:-1].clone()},
            f"{DOWN}.qweight has shape [11, 64], config.json asks for [12,",
        ),
        ("awq", {"qweight": lambda t: t.long()}, f"{DOWN}.qweight is I64, not one of I32"),
        (
            "awq",
            {"scales": lambda t: t[::3].clone()},
            "has shape [1, 64], config.json asks for [3, 64] with group_size=32",
        ),
        ("awq", {"qzeros": lambda t: t.half()}, f"{DOWN}.qzeros is F16, not one of I32"),
        ("awq", {"scales": lambda t: t.int()}, f"{DOWN}.scales is I32, not one of F16"),
        (
            "awq",
            {"scales": lambda t: t.float() * 1e9},
            "feed_forward.w2.0.scales holds scales that are not finite in fp",
        ),
        ("gptq", {"scales": lambda t: t * float("nan")}, "feed_forward.w2.0.scales holds scales that are not finite"),
        ("awq", {"qzeros": None}, f"tensor {DOWN}.qzeros is missing"),
        ("awq", {"qweight": None, "weight": lambda t: torch.ones(64, 96)}, f"{DOWN}.weight stands in the place of"),
        ("awq", {"g_idx": lambda t: torch.zeros(96)}, f"tensor {DOWN}.g_idx is not one of LlamaForCausalLM"),
        ("gptq", {"g_idx": lambda t: t.flip(0)}, f"{DOWN}.g_idx puts inputs into groups out of order: act-order"),
        ("gptq", {"bias": lambda t: torch.arange(64.0)}, f"{DOWN}.bias is not zero"),
        ("hf", {"qweight": lambda t: torch.ones(96, 8), "weight": None}, f"{DOWN}.qweight stands in the place of"),
    ],
    indirect=["checkpoint"],
)
def test_a_tensor_that_does_not_fit(checkpoint: Path, changes: dict[str, Any], problem: str) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for kind, change in changes.items():
        name = f"{DOWN}.{kind}"
        found = tensors.pop(name, None)
        if change is not None:
            tensors[name] = change(found)
    save_file(tensors, file)
    assert problem in refused(checkpoint)


@pytest.mark.parametrize("checkpoint", ["gptq"], indirect=True)
def test_what_a_gptq_checkpoint_may_leave_out_or_add(checkpoint: Path) -> None:
    """Its order of groups where there is no act-order, and AutoGPTQ's biases of zeros."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    expected = dict(open_model(checkpoint).tensors(0))
    del tensors[f"{DOWN}.g_idx"]
    tensors[f"{DOWN}.bias"] = torch.zeros(64)
    save_file(tensors, file)
    assert_same(dict(open_model(checkpoint).tensors(0)), expected)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert f"{DOWN}.g_idx is missing, and act-order (desc_act) is not supported" in refused(checkpoint)


@pytest.mark.parametrize(
    ("checkpoint", "options", "problem"),
    [
        (
            "awq",
            {"model_format": "hf"},
            "--model-format hf, but the weights of {} are in 4 bits: use --model-format awq",
        ),
        ("awq", {"model_format": "gptq"}, "but the weights of {} are in 4 bits: use --model-format awq"),
        ("hf", {"model_format": "awq"}, "--model-format awq, but {} has no 4-bit weights: use --model-format hf"),
        ("awq", {"group_size": 128}, "--group-size 128, but {} has groups of 32: use --group-size 32"),
        ("hf", {"group_size": 64}, "--group-size 64 is for 4-bit weights, and {} has none: leave it out"),
    ],
    indirect=["checkpoint"],
)
def test_options_that_do_not_fit_the_checkpoint(checkpoint: Path, options: dict[str, Any], problem: str) -> None:
    assert problem.format(checkpoint) in refused(checkpoint, ConfigError, **options)


@pytest.mark.parametrize("checkpoint", ["hf"], indirect=True)
def test_weights_that_cannot_be_rounded(checkpoint: Path) -> None:
    message = refused(checkpoint, weight_type="int4")
    assert "group_size=128 does not divide hidden_size=64: use 32" in message
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{DOWN}.weight"][5, 5] = float("nan")
    save_file(tensors, file)
    message = refused(checkpoint, weight_type="int4", group_size=32)
    assert f"{file}: tensor {DOWN}.weight: the weight holds values that are not finite" in message
