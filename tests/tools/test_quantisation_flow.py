"""The commands at the top of docs/quantisation.md, as they stand there, on a tiny checkpoint."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from tests.checkpoints import make_llama_checkpoint
from tests.models.test_llama import prompt_logits, reference_logits
from tests.tools.lite_cases import write_conversations

from tritonmind.config import QuantPolicy
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.workspace import Workspace
from tritonmind_tools.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs/quantisation.md"
# The default samples are many for a tiny model on a CPU.
SHORTER = {"calibrate": ["--calib_samples", "8", "--calib_seqlen", "48"]}


def commands() -> list[list[str]]:
    block = re.search(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    lines = [shlex.split(line) for line in block[1].splitlines() if line.startswith("tritonmind ")]
    assert len(lines) == 5
    return [line[1:] for line in lines]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def test_the_page_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reference = make_llama_checkpoint("Llama-2-7b-chat-hf", hidden=128, head_dim=32, num_kv_heads=4, intermediate=256)
    write_conversations(tmp_path / "chats.json")
    for command in commands():
        assert main([*command, *SHORTER.get(command[1], [])]) == 0, command
    # Scales are also those of 4-bit weights of the same checkpoint.
    scales, quantised = commands()[-1], "./workspace_quant/triton_models/weights"
    assert main([*scales[:-1], quantised]) == 0
    config_ini = Path(quantised, "config.ini")
    config_ini.write_text(config_ini.read_text().replace("quant_policy = 0", "quant_policy = 4"))
    prompt = torch.randint(3, 300, (100,)).tolist()

    def logits(path: str, **overrides: int) -> torch.Tensor:
        workspace = Workspace.open(path)
        config = workspace.engine_config(device="cpu", cache_max_entry_count=16, **overrides)
        runner = ModelRunner(workspace, config)
        assert runner.config.cache.quant_policy == overrides.get("quant_policy", QuantPolicy.KV_INT8_CALIBRATED)
        return prompt_logits(runner, prompt)

    expected = reference_logits(reference, prompt)
    int8, int4 = logits("./workspace", quant_policy=4), logits("./workspace_quant", quant_policy=0)
    both = logits("./workspace_quant")
    errors = relative(int8, expected), relative(int4, expected), relative(both, int4)
    assert 0.002 < errors[0] < 0.075
    # Random weights with 4 bits in groups of 128 lose much; of a weight that was mixed up nothing would be left.
    assert 0.05 < errors[1] < 0.75
    assert 0.002 < errors[2] < 0.075
