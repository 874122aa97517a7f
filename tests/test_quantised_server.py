"""Real weights, quantised by the commands of docs/quantisation.md, behind the real Triton server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.server_fixture import assert_accounts, need_server, running
from tests.workspaces import convert
from tritonmind.workspace import Workspace
from tritonmind_tools.bench.random_checkpoint import hf_config, hf_tensors
from tritonmind_tools.cli import main
from tritonmind_tools.lite import awq_search
from tritonmind_tools.triton_client import TritonClient

ROOT = Path(__file__).resolve().parents[1]
# SmolLM2's hidden size is 576: groups of 128 would not divide it.
GROUP_SIZE = "64"
FEW_ALPHAS, FEW_CLIPS = 4, 2  # of the searches' grids: tests/tools/test_lite_awq.py has all of them


def checkpoint_of(workspace: Path, destination: Path) -> Path:
    """The demo model as a Hugging Face directory: reading its GGUF file once more would take half a minute."""
    source = Workspace.open(workspace)
    shutil.copytree(source.tokenizer_dir, destination)
    save_file({name: tensor.contiguous() for name, tensor in hf_tensors(source)}, destination / "model.safetensors")
    config = {**hf_config(source.model), "torch_dtype": "float32"}
    (destination / "config.json").write_text(json.dumps(config))
    return destination


def write_conversations(path: Path) -> None:
    """Questions about the paragraphs of a page of ours: English, as the model was trained on."""
    paragraphs = [text for text in (ROOT / "README.md").read_text().split("\n\n") if len(text) > 200]
    turns = [
        [{"from": "human", "value": f"Explain this to me.\n\n{text}"}, {"from": "gpt", "value": text}]
        for text in paragraphs
    ]
    path.write_text(json.dumps([{"conversations": conversation} for conversation in turns]))


@pytest.mark.server
def test_four_bit_weights_over_an_int8_cache_answer_sensibly(
    smollm2_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need_server()
    monkeypatch.setattr(awq_search, "NUM_ALPHAS", FEW_ALPHAS)
    monkeypatch.setattr(awq_search, "NUM_CLIPS", FEW_CLIPS)
    model = str(checkpoint_of(smollm2_workspace, tmp_path / "smollm2"))
    write_conversations(tmp_path / "chats.json")
    work_dir = str(tmp_path / "quant_output")
    samples = ["--calib_samples", "4", "--calib_seqlen", "128"]
    data = ["--calib_dataset", str(tmp_path / "chats.json")]
    assert main(["lite", "calibrate", "--model", model, *data, *samples, "--work_dir", work_dir]) == 0
    awq = ["lite", "auto_awq", "--model", model, "--work_dir", work_dir, "--search_tokens", "128"]
    assert main([*awq, "--w_group_size", "128"]) == 1
    assert "128" in capsys.readouterr().err
    assert main([*awq, "--w_group_size", GROUP_SIZE]) == 0
    options = ["--model-format", "awq", "--group-size", GROUP_SIZE]
    workspace = convert(Path(work_dir), tmp_path / "workspace", *options, model_name="smollm2")
    weights = workspace / "triton_models" / "weights"
    assert main(["lite", "kv_qparams", "--work_dir", work_dir, "--turbomind_dir", str(weights)]) == 0
    config = (weights / "config.ini").read_text()
    (weights / "config.ini").write_text(config.replace("quant_policy = 0", "quant_policy = 4"))
    stored = Workspace.open(workspace).model
    assert (stored.weight_type, stored.group_size) == ("int4", int(GROUP_SIZE))

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with running(workspace) as server, TritonClient(server.address) as client:
        deltas = list(client.generate(messages=messages, options={"temperature": 0, "max_tokens": 200}))
        assert "int8 KV cache" in server.log_path.read_text()
    assert_accounts(server.log_path)
    assert "Paris" in "".join(delta.text for delta in deltas)
    assert deltas[-1].finish_reason == "stop"
