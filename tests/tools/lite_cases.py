"""A tiny checkpoint, texts to calibrate it on, and its calibration."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tests.checkpoints import make_llama_checkpoint
from transformers import LlamaForCausalLM

from tritonmind_tools.cli import main

SAMPLES, SEQLEN = 3, 24
WORDS = ("the", "capital", "of", "France", "is", "Paris", "and", "a", "token", "stream", "Größe", "你好", "so")


def write_conversations(path: Path, *, count: int = 40, seed: int = 5) -> Path:
    """Conversations of random words: a .jsonl, or ShareGPT's JSON cut off as a download may be, which needs ijson."""
    draw = random.Random(seed)
    entries = [
        {
            "conversations": [
                {"from": who, "value": " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))} for who in ("human", "gpt")
            ]
        }
        for _ in range(count)
    ]
    lines = "\n".join(map(json.dumps, entries))
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(entries)[:-7])
    return path


def calibrated(
    directory: Path, *options: str, chats: str = "chats.json", **checkpoint: Any
) -> tuple[Path, Path, LlamaForCausalLM]:
    """A checkpoint in `directory`, its work_dir, and the model as Transformers has it."""
    model = make_llama_checkpoint(directory / "checkpoint", **checkpoint)
    run_calibrate(directory, *options, chats=chats)
    return directory / "checkpoint", directory / "work", model


def run_calibrate(directory: Path, *options: str, chats: str = "chats.json") -> None:
    assert lite_calibrate(directory, *options, chats=chats) == 0


def lite_calibrate(directory: Path, *options: str, chats: str = "chats.json") -> int:
    """The command's exit code."""
    dataset = write_conversations(directory / chats)
    command = ["lite", "calibrate", "--model", str(directory / "checkpoint"), "--calib_dataset", str(dataset)]
    command += ["--calib_samples", str(SAMPLES), "--calib_seqlen", str(SEQLEN), "--work_dir", str(directory / "work")]
    return main([*command, *options])


def hooked_inputs(model: LlamaForCausalLM, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What Transformers' linears read, [samples * T, in] by their names, and each layer's K and V by head."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            seen[name] = []
            hooks.append(module.register_forward_pre_hook(lambda _, x, kept=seen[name]: kept.append(x[0][0])))
    with torch.no_grad():
        for sample in tokens.long():
            cache = model(sample.unsqueeze(0), use_cache=True).past_key_values
            for number, layer in enumerate(cache.layers):
                for kind, value in (("key", layer.keys), ("value", layer.values)):
                    seen.setdefault(f"model.layers.{number}.{kind}", []).append(value[0].transpose(0, 1))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(values) for name, values in seen.items()}
