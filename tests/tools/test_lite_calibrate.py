"""`lite calibrate`: statistics against Transformers' own activations, resuming, memory, what it refuses."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoints import LLAMA3_ROPE, make_llama_checkpoint
from tests.model_configs import LLAMA_2_7B
from tests.tolerances import assert_close
from tests.tools.lite_cases import (
    SAMPLES,
    SEQLEN,
    calibrated,
    hooked_inputs,
    lite_calibrate,
    run_calibrate,
    write_conversations,
)

from tritonmind.errors import CheckpointError, ConfigError
from tritonmind_tools.lite import work_dir
from tritonmind_tools.lite.calibrate import calibrate, host_bytes
from tritonmind_tools.lite.decoder_layer import DecoderLayer
from tritonmind_tools.lite.layer_source import LayerSource

FILES = ("inputs_stats", "key_stats", "value_stats")
READERS = {
    "attention.w_qkv": "self_attn.q_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "key": "key",
    "value": "value",
}


def read_statistics(work_dir: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name in FILES:
        found |= load_file(work_dir / "calibration" / f"{name}.safetensors")
    return found


@pytest.mark.parametrize("attention_bias", [False, True])
def test_statistics_are_those_of_transformers(tmp_path: Path, attention_bias: bool) -> None:
    _, work_dir, model = calibrated(tmp_path, attention_bias=attention_bias, rope_scaling=LLAMA3_ROPE, shards=2)
    tokens = load_file(work_dir / "calibration/tokens.safetensors")["tokens"]
    assert tokens.shape == (SAMPLES, SEQLEN) and tokens.dtype == torch.int32
    seen = hooked_inputs(model, tokens)
    statistics = read_statistics(work_dir)
    assert len(statistics) == 2 * len(READERS) * 5
    for number in range(2):
        for name, reader in READERS.items():
            x = seen[f"model.layers.{number}.{reader}"]
            expected = {
                "min": x.amin(0),
                "max": x.amax(0),
                "absmax": x.abs().amax(0),
                "mean": x.mean(0),
                "absmean": x.abs().mean(0),
            }
            for kind, value in expected.items():
                assert_close(statistics[f"layers.{number}.{name}.{kind}"], value)
    assert statistics["layers.0.key.min"].shape == (2, 16)
    assert [path.name for path in work_dir.iterdir()] == ["calibration"]


def test_killed_after_any_layer_it_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_llama_checkpoint(tmp_path / "checkpoint", num_layers=3)
    write_conversations(tmp_path / "chats.json")

    def run(work_dir: Path, **options: Any) -> None:
        calibrate(
            tmp_path / "checkpoint",
            work_dir,
            dataset=str(tmp_path / "chats.json"),
            num_samples=SAMPLES,
            seqlen=SEQLEN,
            state_interval_s=0,
            **options,
        )

    run(tmp_path / "whole")
    computed: list[int] = []
    dying: set[int] = set()
    read_layer = LayerSource.layer

    def counted(source: LayerSource, number: int, cos_sin: torch.Tensor) -> DecoderLayer:
        if number in dying:
            raise KeyboardInterrupt
        computed.append(number)
        return read_layer(source, number, cos_sin)

    monkeypatch.setattr(LayerSource, "layer", counted)
    for number in range(3):
        dying = {number}
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed")
        assert not (tmp_path / "resumed/calibration").exists()
    dying = set()
    run(tmp_path / "resumed")
    assert computed == [0, 1, 2]
    whole, resumed = read_statistics(tmp_path / "whole"), read_statistics(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["calibration"]

    # Other options: what an interrupted run left does not count, and the finished calibration is replaced.
    dying = {2}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", seed=1)
    dying, computed[:] = set(), []
    run(tmp_path / "resumed", seed=2)
    assert computed == [0, 1, 2]
    manifest = json.loads((tmp_path / "resumed/calibration/manifest.json").read_bytes())
    assert manifest["seed"] == 2 and manifest["samples"] == SAMPLES


def test_one_layer_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: before a layer is read, no tensor of an earlier one is alive."""
    make_llama_checkpoint(tmp_path / "checkpoint", num_layers=6)
    read_layer = LayerSource.layer
    alive: list[weakref.ref[torch.Tensor]] = []
    num_read = 0

    def counted(source: LayerSource, number: int, cos_sin: torch.Tensor) -> DecoderLayer:
        nonlocal num_read
        gc.collect()
        assert not any(reference() is not None for reference in alive), f"before layer {number}"
        layer = read_layer(source, number, cos_sin)
        weights = (layer.w_qkv, layer.wo, layer.w1, layer.w3, layer.w2, layer.attention_norm, layer.ffn_norm)
        alive[:] = map(weakref.ref, weights)
        num_read += 1
        return layer

    monkeypatch.setattr(LayerSource, "layer", counted)
    run_calibrate(tmp_path)
    assert num_read == 6


def test_seven_billion_parameters_fit_24_gb_of_host_memory() -> None:
    # 4.3 GB of hidden states and 1.6 GB of weights; the rest is Python and PyTorch.
    assert host_bytes(LLAMA_2_7B, 128, 2048, "cuda") == 4 * (128 * 2048 * 4096 + 2 * (4 * 4096**2 + 3 * 4096 * 11008))
    assert host_bytes(LLAMA_2_7B, 128, 2048, "cpu") < 8e9


@pytest.mark.parametrize("file", ["layer-00001", "key_stats"])
def test_a_full_disk_leaves_what_was_there_and_what_was_done(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated(tmp_path)
    before = read_statistics(tmp_path / "work")
    write = work_dir._write_bytes

    def full(path: Path, data: bytes) -> None:
        if file in path.name:
            write(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(work_dir, "_write_bytes", full)
    assert lite_calibrate(tmp_path, "--seed", "3") == 1
    shown = capsys.readouterr().err
    assert "No space left on device" in shown and f"{file}.safetensors" in shown
    after = read_statistics(tmp_path / "work")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [".calibration.partial", "calibration"]
    assert not list((tmp_path / "work").rglob("*.safetensors.*"))

    monkeypatch.setattr(work_dir, "_write_bytes", write)
    if file == "key_stats":  # all layers were done
        monkeypatch.delattr(LayerSource, "layer")
    run_calibrate(tmp_path, "--seed", "3")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["calibration"]
    assert not torch.equal(read_statistics(tmp_path / "work")["layers.1.key.max"], before["layers.1.key.max"])


def run_with(tmp_path: Path, **options: Any) -> None:
    given = {"dataset": str(tmp_path / "chats.json"), "num_samples": SAMPLES, "seqlen": SEQLEN, **options}
    calibrate(tmp_path / "checkpoint", tmp_path / "work", **given)


def test_what_cannot_be_calibrated_is_named(tmp_path: Path) -> None:
    make_llama_checkpoint(tmp_path / "checkpoint")
    write_conversations(tmp_path / "chats.json")
    with pytest.raises(
        ConfigError, match=r"has \d+ tokens, enough for \d+ samples of --calib_seqlen=24, not for --cal"
    ):
        run_with(tmp_path, num_samples=10_000)
    with pytest.raises(ConfigError, match=r"--calib_seqlen=1024 is more than the model's max_position_embeddings=512"):
        run_with(tmp_path, seqlen=1024)
    with pytest.raises(ConfigError, match=r"need 13107.2 GB of host memory, \d+\.\d GB are free: lower one of the two"):
        run_with(tmp_path, num_samples=100_000_000, seqlen=512)
    with pytest.raises(ConfigError, match=r"--calib_samples=0 must be at least 1"):
        run_with(tmp_path, num_samples=0)
    with pytest.raises(ConfigError, match=r"--calib_dataset=c4: name a local copy with --calib_path FILE"):
        run_with(tmp_path, dataset="c4")
    with pytest.raises(ConfigError, match=r"'absent.txt' is neither a file .* nor one of c4, ptb, wikitext2, pileval"):
        run_with(tmp_path, dataset="absent.txt")
    with pytest.raises(ConfigError, match=r"holds no text"):
        run_with(tmp_path, dataset="c4", dataset_path=_empty(tmp_path / "empty.jsonl"))

    config = json.loads((tmp_path / "checkpoint/config.json").read_text())
    for change, named in (
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}, "is quantised already"),
    ):
        (tmp_path / "checkpoint/config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=named):
            run_with(tmp_path)
    assert not (tmp_path / "work").exists()


def _empty(path: Path) -> Path:
    path.write_text("\n")
    return path


def test_nan_is_named_by_layer_and_input(tmp_path: Path) -> None:
    model = make_llama_checkpoint(tmp_path / "checkpoint", num_layers=3)
    write_conversations(tmp_path / "chats.json")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"layer 1: the input of feed_forward.w2 holds NaN or infinite values"):
        run_with(tmp_path)
    assert not (tmp_path / "work/calibration").exists()
