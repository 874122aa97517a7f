"""`random:SHAPE`: weights without files, the same for our engine, a written checkpoint and Transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.workspaces import convert
from tritonmind.engine.launch import start_engine
from tritonmind.errors import ConfigError, WorkspaceError
from tritonmind.kernels.awq_format import AwqWeight, dequantize
from tritonmind.messages import EngineRequest
from tritonmind.model_source import open_model
from tritonmind.random_model import SHAPES, RandomModel
from tritonmind.tensor_layout import AWQ_KINDS, common_tensor_specs, tensor_specs
from tritonmind.tokenizer import Tokenizer
from tritonmind.workspace import Workspace
from tritonmind_tools.bench import random_checkpoint
from tritonmind_tools.bench.rounds import FIRST_PLAIN_TOKEN_ID


@pytest.mark.parametrize(
    ("dtype", "drawn"), [("auto", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_tensors_are_those_of_the_layout(dtype: str, drawn: torch.dtype) -> None:
    source = open_model("random:tiny", dtype=dtype)
    specs = common_tensor_specs(source.model) | tensor_specs(source.model, 1, 0)
    found = dict(source.tensors(rank=0))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    assert {tensor.dtype for tensor in found.values()} == {drawn}
    for name, tensor in found.items():
        mean = 1.0 if "norm" in name else 0.0
        assert tensor.float().mean().item() == pytest.approx(mean, abs=0.02), name
        assert 0.01 < tensor.float().std().item() < 0.03, name
    again = dict(open_model("random:tiny", dtype=dtype).tensors(rank=0))
    assert all(torch.equal(tensor, again[name].to(tensor.device)) for name, tensor in found.items())


def test_4_bit_weights_are_those_of_the_layout() -> None:
    """With the mean and the deviation of the others', and with groups that fit."""
    source = open_model("random:tiny:int4")
    assert (source.model.weight_type, source.model.group_size, source.model.float_type) == ("int4", 32, "fp16")
    assert open_model("random:llama-2-7b:int4").model == open_model("random:llama2-7b:int4").model
    assert open_model("random:llama2-7b:int4").model.group_size == 128
    found = dict(source.tensors(rank=0))
    specs = common_tensor_specs(source.model) | tensor_specs(source.model, 1, 0)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    w2 = dequantize(AwqWeight(*(found[f"layers.0.feed_forward.w2.0.{kind}"] for kind in AWQ_KINDS)))
    assert w2.mean().item() == pytest.approx(0.0, abs=0.001) and w2.std().item() == pytest.approx(0.02, rel=0.1)
    assert found["norm.weight"].dtype == torch.float16


def test_a_written_checkpoint_has_the_same_weights(tmp_path: Path) -> None:
    """Through the names of Transformers and `convert` back to ours. Its tokenizer has a text for every plain id."""
    random_checkpoint.write("tiny", tmp_path / "checkpoint")
    workspace = Workspace.open(convert(tmp_path / "checkpoint", tmp_path / "workspace"))
    stored = dict(workspace.tensors(rank=0))
    drawn = dict(RandomModel("tiny").tensors(rank=0))
    assert stored.keys() == drawn.keys()
    for name, tensor in drawn.items():
        assert torch.equal(stored[name], tensor.cpu()), name
    tokenizer = Tokenizer.from_dir(workspace.tokenizer_dir)
    assert all(tokenizer.token_bytes(i) for i in range(FIRST_PLAIN_TOKEN_ID, SHAPES["tiny"].vocab_size))


def test_a_workspace_written_at_once_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    """Its weights, its tokenizer and its configuration, with checksums that hold."""
    random_checkpoint.write("tiny", tmp_path / "checkpoint")
    converted = Workspace.open(convert(tmp_path / "checkpoint", tmp_path / "converted"))
    random_checkpoint.write_workspace("tiny", tmp_path / "workspace", durable=False)
    workspace = Workspace.open(tmp_path / "workspace")
    stored, expected = dict(workspace.tensors(rank=0)), dict(converted.tensors(rank=0))
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name
    assert dataclasses.replace(workspace.model, model_name="tiny") == converted.model
    tokenizers = [Tokenizer.from_dir(each.tokenizer_dir) for each in (workspace, converted)]
    ids = range(SHAPES["tiny"].vocab_size)
    assert len({b"".join(map(tokenizer.token_bytes, ids)) for tokenizer in tokenizers}) == 1
    assert workspace.engine_config() == dataclasses.replace(converted.engine_config(), model=workspace.model)


def test_a_workspace_with_4_bit_weights_holds_what_is_drawn(tmp_path: Path) -> None:
    random_checkpoint.write_workspace("tiny:int4", tmp_path / "workspace", durable=False)
    assert_stored_as_drawn(tmp_path / "workspace", RandomModel("tiny:int4"))


def assert_stored_as_drawn(path: Path, source: RandomModel) -> None:
    workspace = Workspace.open(path)
    assert workspace.model.weight_type == source.model.weight_type
    stored, drawn = dict(workspace.tensors(rank=0)), dict(source.tensors(rank=0))
    assert stored.keys() == drawn.keys()
    assert all(torch.equal(stored[name], tensor.cpu()) for name, tensor in drawn.items())


def test_an_engine_process_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, from any folder, with sessions longer than its positions."""
    monkeypatch.chdir(tmp_path)
    session_len = SHAPES["tiny"].max_position_embeddings + 100
    overrides: dict[str, object] = {"session_len": session_len, "cache_max_entry_count": 16, "num_threads": 1}
    client = start_engine("random:tiny", overrides)
    try:
        assert client.info.vocab_size == SHAPES["tiny"].vocab_size
        request = EngineRequest(
            request_id=1, prompt_token_ids=[5] * (session_len - 4), max_tokens=4, temperature=0.0, top_k=0, top_p=1.0,
            seed=0, stop_token_ids=[],
        )  # fmt: skip
        assert sum(len(output.token_ids) for output in client.stream(request)) == 4
    finally:
        client.shutdown()


def test_what_it_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match="'random:llama-9' names no known shape; there are random:llama2-7b, "):
        open_model("random:llama-9")
    with pytest.raises(
        ConfigError, match=r"'random:tiny:int3' names no known shape; .* each also with :int4 behind it"
    ):
        open_model("random:tiny:int3")
    with pytest.raises(ConfigError, match="dtype='fp8' is not one of auto, fp16, bf16, fp32"):
        open_model("random:tiny", dtype="fp8")
    with pytest.raises(WorkspaceError, match="random:tiny has no tokenizer"):
        _ = open_model("random:tiny").tokenizer_dir
    with pytest.raises(ConfigError, match="max_batch_size=0"):
        open_model("random:tiny").engine_config(max_num_seqs=0)


@pytest.mark.gpu
def test_weights_drawn_on_the_card_arrive_there() -> None:
    """Without a way over the host, on the stream that the model is used on."""
    from tritonmind.models.weight_loader import load_model

    device = torch.device("cuda")
    source = RandomModel("llama-150m")
    model = load_model(source.model, source.tensors(0), max_model_len=128, dtype=torch.float16, device=device)
    drawn = dict(source.tensors(0))
    assert torch.equal(model.tok_embeddings, drawn["tok_embeddings.weight"])
    assert torch.equal(model.layers[3].w13.weight.chunk(2)[1], drawn["layers.3.feed_forward.w3.0.weight"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-150m", "llama-150m:int4"])
def test_weights_drawn_on_the_card_are_written_as_they_are(tmp_path: Path, name: str) -> None:
    """Large and small ones in turn, of several types, which share memory on their way."""
    random_checkpoint.write_workspace(name, tmp_path / "workspace", durable=False)
    assert_stored_as_drawn(tmp_path / "workspace", RandomModel(name))
