"""Checkpoints in pickle files: Meta's format and PyTorch's .bin, read only when asked, to the same workspace."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from tests.checkpoints import make_llama_checkpoint
from tests.converted import assert_same, expected_tensors, read_all
from tests.meta_checkpoint import write_meta_checkpoint
from tests.vocabularies import train_sentencepiece

from tritonmind.engine.llm import LLM
from tritonmind.errors import CheckpointError, TritonmindError, WorkspaceError
from tritonmind.model_source import open_model
from tritonmind.sampling_params import SamplingParams
from tritonmind.workspace import Workspace
from tritonmind_tools.cli import main
from tritonmind_tools.convert import convert

NAMED = {"architectures": ["LlamaForCausalLM"]}


def refused(path: Path, tmp_path: Path, *, allow_pickle: bool = True) -> str:
    with pytest.raises(CheckpointError) as error:
        convert("tiny", path, tmp_path / "refused", allow_pickle=allow_pickle)
    assert not (tmp_path / "refused").exists()
    return str(error.value)


@pytest.mark.parametrize(("ranks", "tp"), [(1, 2), (2, 1)])
def test_metas_format(tmp_path: Path, ranks: int, tp: int) -> None:
    """The rows of q and k are turned, the ranks' parts joined; the tokenizer may lie beside the model's folder."""
    model = make_llama_checkpoint(tmp_path / "hf", vocab=400, dtype=torch.float16)
    source = tmp_path / "meta" / "7B"
    write_meta_checkpoint(source, model, ranks=ranks)
    train_sentencepiece(source.parent, vocab=400)
    assert "consolidated.00.pth" in (message := refused(source, tmp_path, allow_pickle=False))
    assert "--allow-pickle" in message
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_model(source)
    workspace = tmp_path / "workspace"
    arguments = ["convert", "llama2", str(source), "--dst-path", str(workspace), "--tp", str(tp), "--allow-pickle"]
    assert main(arguments) == 0
    assert_same(read_all(workspace), expected_tensors(dict(model.state_dict()), 2, tp, tied=False))
    config = Workspace.open(workspace).model
    assert (config.num_kv_heads, config.intermediate_size, config.vocab_size) == (2, 96, 400)
    assert (config.bos_token_id, config.eos_token_ids, config.max_position_embeddings) == (1, (2,), 4096)


def test_what_params_say(tmp_path: Path) -> None:
    model = make_llama_checkpoint(tmp_path / "hf", num_layers=1, norm_eps=1e-6, vocab=400)
    train_sentencepiece(tmp_path / "meta", vocab=400)
    for theta, eps, length in ((None, 1e-6, 2048), (1e6, 1e-5, 16384)):
        model.config.rms_norm_eps = eps
        write_meta_checkpoint(tmp_path / "meta", model, ranks=1, rope_theta=theta)
        made = convert("tiny", tmp_path / "meta", tmp_path / "workspace", allow_pickle=True, force=True)
        assert (made.max_position_embeddings, made.rope_theta, made.norm_eps) == (length, theta or 1e4, eps)
    params = tmp_path / "meta" / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"use_scaled_rope": True}))
    assert "params.json: use_scaled_rope=True is not supported in this format" in refused(tmp_path / "meta", tmp_path)
    (tmp_path / "meta" / "consolidated.00.pth").write_bytes(b"PK nothing")
    params.write_text("{}")
    assert "consolidated.00.pth cannot be read as tensors" in refused(tmp_path / "meta", tmp_path)


@pytest.mark.parametrize("indexed", [False, True])
def test_bin_files(tmp_path: Path, indexed: bool) -> None:
    source = tmp_path / "checkpoint"
    model = make_llama_checkpoint(source, safe_serialization=False, dtype=torch.bfloat16, config_overrides=NAMED)
    if indexed:
        state = torch.load(source / "pytorch_model.bin", weights_only=True)
        (source / "pytorch_model.bin").unlink()
        names = list(state)
        files = {"a.bin": names[::2], "b.bin": names[1::2]}
        for file, held in files.items():
            torch.save({name: state[name] for name in held}, source / file)
        weight_map = {name: file for file, held in files.items() for name in held}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert("tiny", source, tmp_path / "workspace", allow_pickle=True)
    assert_same(read_all(tmp_path / "workspace"), expected_tensors(dict(model.state_dict()), 2, 1, tied=False))
    with pytest.raises((CheckpointError, WorkspaceError), match="--allow-pickle"):
        open_model(source)
    assert_same(dict(open_model(source, allow_pickle=True).tensors(0)), read_all(tmp_path / "workspace"))


def test_an_engine_reads_what_it_may(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    make_llama_checkpoint(source, safe_serialization=False, num_layers=1, config_overrides=NAMED)
    with LLM(str(source), in_process=True, device="cpu", cache_max_entry_count=8, allow_pickle="true") as llm:
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids
    for value, problem in (("false", "--allow-pickle"), ("maybe", "allow_pickle='maybe' is invalid")):
        with pytest.raises(TritonmindError, match=problem):
            LLM(str(source), in_process=True, device="cpu", allow_pickle=value)


class _Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("harm",)


def test_nothing_in_a_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "checkpoint"
    make_llama_checkpoint(source, safe_serialization=False, num_layers=1, config_overrides=NAMED)
    for write in (
        lambda file: torch.save({"model.norm.weight": _Harmful()}, file),
        lambda file: file.write_bytes(pickle.dumps(_Harmful())),
        lambda file: torch.save([1, 2], file),
    ):
        write(source / "pytorch_model.bin")
        assert "pytorch_model.bin" in refused(source, tmp_path)
        assert not (tmp_path / "harm").exists()
