"""AWQ: its scales and ranges against what they must achieve, and the checkpoint that `lite auto_awq` writes."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import make_llama_checkpoint
from tests.tolerances import assert_close
from tests.tools.lite_cases import calibrated, write_conversations
from transformers import LlamaForCausalLM

from tritonmind.checkpoints.reading import open_checkpoint
from tritonmind.config import ModelConfig
from tritonmind.errors import CheckpointError, ConfigError
from tritonmind.kernels.awq_format import AwqWeight, dequantize, quantize, quantize_groups
from tritonmind.kernels.reference import rms_norm
from tritonmind.layers.rotary import rotary_table
from tritonmind_tools.cli import main
from tritonmind_tools.lite import auto_awq as command
from tritonmind_tools.lite import variants
from tritonmind_tools.lite.auto_awq import auto_awq
from tritonmind_tools.lite.awq_search import NUM_ALPHAS, group_products, search_clip, search_scales
from tritonmind_tools.lite.decoder_layer import QKV, W1, W2, WO, DecoderLayer
from tritonmind_tools.lite.folding import fold, foldable_inputs, smoothing_scales
from tritonmind_tools.lite.layer_awq import QuantisedLayer, Scaling, quantise_layer, run_layer
from tritonmind_tools.lite.statistics import LayerStatistics

CPU = torch.device("cpu")
GROUP = 32
TOKENS = 48


def make_layer(num_kv_heads: int = 4, *, bias: bool = False, outliers: bool = False) -> DecoderLayer:
    """A random layer of 4 heads; outliers: some channels are far larger than the others, as in trained models."""
    model = ModelConfig(
        architecture="LlamaForCausalLM",
        model_name="tiny",
        vocab_size=300,
        hidden_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        intermediate_size=96,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=512,
        weight_type="fp32",
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    qkv_size = (4 + 2 * num_kv_heads) * 16

    def weight(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs) / inputs**0.5

    norms = [1 + 0.3 * torch.randn(64) for _ in range(2)]
    w_qkv, w3 = weight(qkv_size, 64), weight(96, 64)
    if outliers:
        for norm, channels in zip(norms, ((3, 40), (17, 50)), strict=True):
            norm[list(channels)] *= 20
        w3[[5, 70]] *= 20
        w_qkv[: 4 * 16] *= 0.02  # or each token would attend to one other alone
    return DecoderLayer(
        model=model,
        cos_sin=rotary_table(model, TOKENS, CPU).cos_sin,
        attention_norm=norms[0],
        w_qkv=w_qkv,
        qkv_bias=torch.randn(qkv_size) if bias else None,
        wo=weight(64, 64),
        o_bias=torch.randn(64) if bias else None,
        ffn_norm=norms[1],
        w1=weight(96, 64),
        w3=w3,
        w2=weight(64, 96),
    )


def quantised(layer: DecoderLayer, hidden: torch.Tensor, scaling: Scaling) -> QuantisedLayer:
    statistics = LayerStatistics(layer.model, 0, CPU)
    for sample in hidden:
        layer.forward(sample, statistics.observe)
    by_input: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in statistics.tensors().items():
        what, _, kind = name.removeprefix("layers.0.").rpartition(".")
        by_input.setdefault(what, {})[kind] = tensor
    return quantise_layer(layer, by_input, run_layer(layer, hidden.clone(), CPU), group_size=GROUP, scaling=scaling)


def dequantised(found: QuantisedLayer) -> DecoderLayer:
    return found.layer.replace(
        w_qkv=torch.cat([dequantize(part) for part in (found.q, found.k, found.v)]),
        **{name: dequantize(getattr(found, name)) for name in ("wo", "w1", "w3", "w2")},
    )


@pytest.mark.parametrize(("num_kv_heads", "bias"), [(4, True), (2, True), (1, False)])
def test_folded_scales_leave_the_function_unchanged(num_kv_heads: int, bias: bool) -> None:
    layer = make_layer(num_kv_heads, bias=bias)
    inputs = foldable_inputs(layer)
    assert (WO in inputs) == (num_kv_heads == 4) and {QKV, W1, W2} < {*inputs, "else"}
    widths = {QKV: 64, WO: 64, W1: 64, W2: 96}
    scales = {name: torch.exp(torch.randn(widths[name])) for name in inputs}
    folded = fold(layer, scales)
    assert not torch.equal(folded.w2, layer.w2) and not torch.equal(folded.w_qkv, layer.w_qkv)
    hidden = torch.randn(TOKENS, 64)
    assert_close(folded.forward(hidden), layer.forward(hidden))


def test_search_beats_rounding_where_channels_stand_out() -> None:
    """On held-out inputs, in either block, by far; a search that did nothing would be no better."""
    layer = make_layer(outliers=True)
    hidden, held_out = torch.randn(8, TOKENS, 64), torch.randn(8, TOKENS, 64)

    def blocks(layer: DecoderLayer) -> list[torch.Tensor]:
        attention = [layer.attention(rms_norm(x, layer.attention_norm, eps=1e-5)) for x in held_out]
        feed_forward = [layer.feed_forward(rms_norm(x, layer.ffn_norm, eps=1e-5)) for x in held_out]
        return [torch.stack(attention), torch.stack(feed_forward)]

    def errors(scaling: Scaling) -> list[float]:
        pairs = zip(blocks(dequantised(quantised(layer, hidden, scaling))), blocks(layer), strict=True)
        return [((found - want).square().mean() / want.square().mean()).sqrt().item() for found, want in pairs]

    searched, smoothed, nearest = errors("search"), errors("smooth"), errors("none")
    shown = (searched, smoothed, nearest)
    assert all(found < 0.85 * rounded for found, rounded in zip(searched, nearest, strict=True)), shown
    assert sum(searched) < 1.05 * sum(smoothed), shown
    assert all(alpha > 0 for alpha in quantised(layer, hidden, "search").alphas.values())


def test_scale_search_takes_the_best_of_its_grid() -> None:
    weight, absmean = torch.randn(16, 64), torch.rand(64) + 0.1
    tried: list[torch.Tensor] = []

    def loss(rounded: torch.Tensor) -> float:
        tried.append(rounded)
        return float(abs(len(tried) - 8))

    found = search_scales(weight, absmean, GROUP, loss)
    assert len(tried) == NUM_ALPHAS and found.alpha == pytest.approx(7 / NUM_ALPHAS)
    assert_close(found.scales, absmean**0.35 / (absmean.max() * absmean.min()) ** 0.175)
    # Alpha 0 is rounding to nearest, and every trial is near the weight itself, not the scaled one.
    assert torch.equal(tried[0], dequantize(quantize(weight, GROUP)))
    assert all((trial - weight).square().mean().sqrt() < 0.35 for trial in tried)


def test_clip_search_is_never_worse_in_any_group_and_better_overall() -> None:
    x, weight = torch.randn(200, 64), torch.randn(24, 64)
    minimum, maximum = search_clip(weight, group_products(x, GROUP), GROUP)

    def group_errors(quantised: AwqWeight) -> torch.Tensor:
        """[out, groups]: mean square of what a group's error adds to the output."""
        wrong = (dequantize(quantised) - weight).unflatten(1, (-1, GROUP))
        return torch.einsum("tgi,ogi->tog", x.unflatten(1, (-1, GROUP)), wrong).square().mean(0)

    clipped, nearest = group_errors(quantize_groups(weight, minimum, maximum)), group_errors(quantize(weight, GROUP))
    assert (clipped <= nearest * (1 + 1e-4)).all()
    assert clipped.sum() < 0.97 * nearest.sum()


def test_smoothing_is_the_tutorials_formula() -> None:
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[0, 1], weight[1, 0], weight[1, 1] = 2.0, -1.0, 1.0, 4.0
    weight[:, 2:] = 4.0
    absmax = torch.ones(64)
    absmax[0] = 9.0
    # |w| over the group's largest: rows (2/4, 1/4 | 1 ...), (1/4, 4/4 | 1 ...); their means 0.375, 0.625 and 1.
    root = torch.tensor([(9 / 0.375) ** 0.5, (1 / 0.625) ** 0.5, *[1.0] * 62])
    assert_close(smoothing_scales(weight, absmax, GROUP), root / (root.max() * root.min()).sqrt())


def test_a_dead_channel_and_zero_weights_have_finite_scales() -> None:
    layer = make_layer(outliers=True)
    layer.attention_norm[7] = 0.0
    layer.w2[:, 32:64] = 0.0
    layer.w1[:, :32] = 0.0
    hidden = torch.randn(2, TOKENS, 64)
    scalings: tuple[Scaling, ...] = ("search", "smooth", "none")
    for scaling in scalings:
        assert torch.isfinite(dequantised(quantised(layer, hidden, scaling)).forward(hidden[0])).all(), scaling


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A directory with checkpoint and a calibrated work, and the model."""
    directory = tmp_path_factory.mktemp("awq")
    _, _, model = calibrated(directory, num_kv_heads=4, attention_bias=True)
    return directory, model


@pytest.mark.parametrize("options", [[], ["--search_scale", "False"], ["--round_to_nearest"]])
def test_the_checkpoint_is_the_model_in_4_bits(work: tuple[Path, LlamaForCausalLM], options: list[str]) -> None:
    directory, model = work
    common = ["lite", "auto_awq", "--model", str(directory / "checkpoint"), "--work_dir", str(directory / "work")]
    assert main([*common, "--w_bits", "4", "--w_group_size", str(GROUP), *options]) == 0

    checkpoint = open_checkpoint(directory / "work")
    assert checkpoint.config["quantization_config"]["group_size"] == GROUP
    read = {name: checkpoint.read(name, 0, 0, tensor.shape[0]) for name, tensor in checkpoint.tensors.items()}
    state = {name: tensor.float() for name, tensor in read.items() if name.endswith((".weight", ".bias"))}
    for name in {name.rpartition(".")[0] for name in read if name.endswith(".qweight")}:
        weight = AwqWeight(*(read[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales")))
        state[f"{name}.weight"] = dequantize(weight)
    rounded = LlamaForCausalLM(model.config).eval()
    rounded.load_state_dict(state)
    tokens = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        expected, found = model(tokens).logits, rounded(tokens).logits
    error = ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
    assert 0.01 < error < 0.6  # of other weights, or in another order, it is 1.4
    norm = "model.layers.1.input_layernorm.weight"
    assert (options == ["--round_to_nearest"]) == torch.equal(state[norm], model.state_dict()[norm].half().float())
    assert sorted(path.name for path in (directory / "work").iterdir() if path.is_dir()) == ["calibration"]


def test_what_cannot_be_quantised_is_named(work: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    directory, _ = work
    checkpoint = directory / "checkpoint"

    def refused(error: type[Exception], match: str, model: Path = checkpoint, **options: Any) -> None:
        with pytest.raises(error, match=match):
            auto_awq(model, **({"work_dir": directory / "work", "group_size": GROUP} | options))

    refused(ConfigError, r"group_size=64 does not divide intermediate_size=96: use 32", group_size=64)
    refused(ConfigError, r"group_size=48 must be one of 32, 64, 128", group_size=48)
    refused(ConfigError, r"--w_bits=8 is not supported: only 4", w_bits=8)
    refused(ConfigError, r"holds no finished calibration: run `tritonmind lite calibrate", work_dir=tmp_path / "none")
    refused(CheckpointError, r"is where the model itself is", work_dir=checkpoint)
    make_llama_checkpoint(tmp_path / "other", num_kv_heads=4, attention_bias=True, seed=1)
    refused(ConfigError, r"holds the calibration of another model \(checkpoint\) than", tmp_path / "other")
    auto_awq(checkpoint, tmp_path / "quantised", group_size=GROUP, scaling="none")
    refused(CheckpointError, r"is quantised already \(awq, 4 bits\)", tmp_path / "quantised")
    assert not (tmp_path / "none").exists()


def test_nothing_half_written_is_left(
    work: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise, calls = command._by_checkpoint_name, 0

    def dies(*arguments: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGTERM)
        return quantise(*arguments)

    monkeypatch.setattr(command, "_by_checkpoint_name", dies)
    checkpoint, group_size = str(work[0] / "checkpoint"), str(GROUP)
    arguments = ["--model", checkpoint, "--work_dir", str(tmp_path / "out"), "--w_group_size", group_size]
    assert main(["lite", "auto_awq", *arguments, "--round_to_nearest"]) == 130
    assert calls == 2 and not (tmp_path / "out").exists()

    weight = "model.layers.1.mlp.up_proj.weight"
    model = make_llama_checkpoint(tmp_path / "damaged")
    with torch.no_grad():
        model.get_parameter(weight)[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "damaged")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"layer 1: the weight holds values that are not finite"):
        auto_awq(tmp_path / "damaged", tmp_path / "out", group_size=GROUP, scaling="none")
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "damaged/config.json").read_bytes())["num_hidden_layers"] == 2


def test_variants_share_a_draw_and_leave_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_llama_checkpoint(tmp_path / "checkpoint")
    dataset = write_conversations(tmp_path / "chats.json")
    command = ["variants", str(tmp_path / "checkpoint"), str(dataset), str(tmp_path / "out"), "--seeds", "0", "1"]
    command += ["--w-group-size", str(GROUP), "--calib-samples", "3", "--calib-seqlen", "24"]
    monkeypatch.setattr(sys, "argv", command)
    variants.main()
    files = {path.parent.name: path.read_bytes() for path in (tmp_path / "out").glob("*/model.safetensors")}
    assert files.keys() == {"nearest", "search-0", "search-1", "smooth-0", "smooth-1"}
    assert len(set(files.values())) == 5
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    variants.main()
    assert all(path.stat().st_mtime_ns == when for path, when in written.items() if path.name == "model.safetensors")
