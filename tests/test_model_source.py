"""A checkpoint opened as it stands is the workspace that `convert` would make of it, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import LLAMA3_ROPE, make_llama_checkpoint
from tests.converted import assert_same
from tests.terminal import environment
from tests.workspaces import convert
from tritonmind.checkpoints.checkpoint_model import CheckpointModel
from tritonmind.engine.llm import LLM
from tritonmind.errors import CheckpointError, ConfigError, TritonmindError, WorkspaceError
from tritonmind.model_source import open_model
from tritonmind.sampling_params import SamplingParams
from tritonmind.workspace import Workspace
from tritonmind_tools.demo import demo_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 10, "hidden": 48},
    "bias, sharded": {"attention_bias": True, "shards": 3},
    "tied, bf16": {"tie": True, "dtype": torch.bfloat16},
    "llama3 rope": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "eos_token_id": [2, 0]},
    "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
PROMPTS = ["one", [40, 41, 42], [{"role": "user", "content": "hi"}]]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "tiny"
    make_llama_checkpoint(root)
    return root


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage. The folder's name is the model's."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


def assert_like_converted(checkpoint: Path, workspace: Path, **options: Any) -> None:
    found, expected = open_model(checkpoint, **options), Workspace.open(workspace)
    assert found.model == expected.model
    assert found.engine_config() == expected.engine_config()
    overrides = {"session_len": 100, "max_num_seqs": "3"}
    assert found.engine_config(**overrides) == expected.engine_config(**overrides)
    assert_same(dict(found.tensors(0)), dict(expected.tensors(0)))


@pytest.mark.parametrize("shape", SHAPES)
def test_model_settings_and_tensors_are_the_workspaces(tmp_path: Path, shape: str) -> None:
    make_llama_checkpoint(tmp_path / "tiny", **SHAPES[shape])
    assert_like_converted(tmp_path / "tiny", convert(tmp_path / "tiny", tmp_path / "workspace"))


@pytest.mark.parametrize("weight_type", ["fp32", "bf16", "fp16"])
def test_weights_have_the_type_that_is_computed_in(checkpoint: Path, tmp_path: Path, weight_type: str) -> None:
    workspace = convert(checkpoint, tmp_path / "workspace", "--weight-type", weight_type)
    assert_like_converted(checkpoint, workspace, dtype=weight_type)


def test_answers_are_the_workspaces(checkpoint: Path, tmp_path: Path) -> None:
    workspace = convert(checkpoint, tmp_path / "workspace")
    before = sorted(checkpoint.rglob("*"))
    answers = []
    for path in (checkpoint, workspace):
        with LLM(str(path), in_process=True, device="cpu", cache_max_entry_count=64) as llm:
            answers.append([completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)])
    assert answers[0] == answers[1]
    assert sorted(checkpoint.rglob("*")) == before


def test_tokenizer_is_read_in_place(checkpoint: Path) -> None:
    assert open_model(checkpoint).tokenizer_dir == checkpoint


def make_gguf_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a checkpoint write its tokenizer, as those do whose files cannot be read in place."""
    monkeypatch.setattr("tritonmind.checkpoints.hf_checkpoint.HfCheckpoint.tokenizer_in_place", lambda self: None)


def test_temporary_tokenizer_lives_as_long_as_the_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gguf_like(monkeypatch)
    source = CheckpointModel(checkpoint)
    directory = source.tokenizer_dir
    assert (directory / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert source.tokenizer_dir == directory != checkpoint
    del source
    assert not directory.exists()


def test_temporary_tokenizer_is_removed_at_exit(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from tritonmind.checkpoints.hf_checkpoint import HfCheckpoint\n"
        "from tritonmind.model_source import open_model\n"
        "HfCheckpoint.tokenizer_in_place = lambda self: None\n"
        "source = open_model(sys.argv[1])\n"
        "print((source.tokenizer_dir / 'tokenizer.json').stat().st_size)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)],
        env=environment(TMPDIR=str(temporary)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert int(done.stdout) == (checkpoint / "tokenizer.json").stat().st_size, done.stderr
    assert not any(temporary.iterdir())


def test_gguf_file_is_the_workspace_of_it(smollm2_workspace: Path) -> None:
    path = demo_checkpoint()
    source, workspace = open_model(path, dtype="fp32"), Workspace.open(smollm2_workspace)
    assert dataclasses.replace(source.model, model_name="smollm2") == workspace.model
    assert source.model.model_name == path.stem
    for file in workspace.tokenizer_dir.iterdir():
        assert (source.tokenizer_dir / file.name).read_bytes() == file.read_bytes(), file.name
    assert_same(dict(source.tensors(0)), dict(workspace.tensors(0)))


def refused(path: Path, kind: type[TritonmindError], **overrides: Any) -> str:
    """The message of an engine that must not start on `path`."""
    with pytest.raises(kind) as error:
        LLM(str(path), in_process=True, device="cpu", **overrides).close()
    return str(error.value)


def test_what_convert_refuses_is_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 97}))
    assert "has shape [96, 64], config.json asks for [97, 64]" in refused(checkpoint, CheckpointError)
    (checkpoint / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    assert "hidden_act='gelu' is not supported" in refused(checkpoint, CheckpointError)
    (checkpoint / "config.json").unlink()
    message = refused(checkpoint, WorkspaceError)
    assert f"{checkpoint} is no workspace" in message and "nor is it a checkpoint: it has no config.json" in message


def test_weights_that_fp16_cannot_hold_are_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, file)
    message = refused(checkpoint, CheckpointError)
    assert "norm.weight holds values that fp16 cannot" in message and "with dtype bf16 or fp32" in message
    LLM(str(checkpoint), in_process=True, device="cpu", dtype="fp32", cache_max_entry_count=64).close()


def test_paths_and_options_that_are_wrong(checkpoint: Path, tmp_path: Path) -> None:
    assert "does not exist: give a workspace, a checkpoint's directory" in refused(tmp_path / "nowhere", WorkspaceError)
    assert "neither a directory nor a .gguf file" in refused(checkpoint / "config.json", CheckpointError)
    assert "dtype='fp8' is invalid" in refused(checkpoint, ConfigError, dtype="fp8")
    assert "unknown option 'warmth'" in refused(checkpoint, ConfigError, warmth=1)
    assert f"the weights beside {checkpoint} are split for 1" in refused(checkpoint, ConfigError, tensor_para_size=2)
    (checkpoint / "tokenizer.json").unlink()
    assert f"{checkpoint} has none of tokenizer.json, tokenizer.model" in refused(checkpoint, CheckpointError)


def test_where_only_a_workspace_will_do_a_checkpoint_is_told_so(checkpoint: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"is a checkpoint, no workspace: run `tritonmind convert"):
        Workspace.open(checkpoint)


def test_a_workspace_keeps_its_name_and_template(checkpoint: Path, tmp_path: Path) -> None:
    workspace = convert(checkpoint, tmp_path / "workspace")
    name = Workspace.open(workspace).model.model_name
    assert open_model(workspace, model_name=name).warnings == ()
    (warning,) = open_model(workspace, model_name="llama2").warnings
    assert f"is a workspace of {name}: the name llama2 says nothing" in warning
    with pytest.raises(ConfigError, match="is a workspace, which has the chat template"):
        open_model(workspace, chat_template="llama2")
