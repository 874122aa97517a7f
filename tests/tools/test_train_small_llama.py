"""The recipe for the small Llama, at a size that a CPU trains in seconds: the engine reads what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tritonmind.engine.llm import LLM
from tritonmind.sampling_params import SamplingParams
from tritonmind_tools.bench import train_small_llama as recipe

ANSWER = "The quick brown fox jumps over the lazy dog."


def conversations(path: Path, number: int) -> None:
    entries = [
        {
            "id": f"chat{n // 2}_{n % 2}",
            "conversations": [{"from": "human", "value": f"Say it {n}."}, {"from": "gpt", "value": ANSWER}],
        }
        for n in range(number)
    ]
    path.write_text(json.dumps(entries)[:-30])  # cut off


def test_prepared_and_trained_it_says_what_it_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(recipe, "ARCHITECTURE", {**recipe.ARCHITECTURE, **small, **heads})
    sizes = {"VOCAB_SIZE": 320, "WINDOW": 64, "BATCH": 4, "WARM_UP_STEPS": 5, "PEAK_RATE": 2e-2, "HELDOUT_SHARE": 8}
    for name, value in sizes.items():
        monkeypatch.setattr(recipe, name, value)
    conversations(tmp_path / "chats.json", 400)
    data, output = tmp_path / "data", tmp_path / "llama"
    assert recipe.main(["prepare", str(tmp_path / "chats.json"), str(data)]) == 0
    parts = [json.loads((data / f"{name}.json").read_text()) for name in ("train", "heldout")]
    ids = [{entry["id"].partition("_")[0] for entry in part} for part in parts]
    assert len(parts[0]) + len(parts[1]) == 399 and len(parts[1]) > 20
    assert not ids[0] & ids[1], "parts of one conversation are on both sides"
    tokens = np.load(data / "train.npy")
    assert tokens[0] == 0 and (tokens == 0).sum() == len(parts[0])  # each begins a text

    recipe.train(data, output, 40, compiled=False, device="cpu")
    shown = capsys.readouterr().out
    perplexity = float(shown.partition("held-out perplexity ")[2].partition(",")[0])
    assert perplexity < 3, shown  # 320 of a model that knows nothing
    with LLM(str(output), dtype="fp32", max_model_len=64, max_num_seqs=1, in_process=True) as llm:
        (answer,) = llm.generate([[{"role": "user", "content": "Say it 7."}]], SamplingParams(temperature=0.0))
    assert answer.text == ANSWER and answer.finish_reason == "stop"


def test_rate_rises_then_falls_to_nothing() -> None:
    rates = [recipe.learning_rate(step, 1000) for step in range(1000)]
    top = recipe.WARM_UP_STEPS
    assert rates[top] == max(rates) == recipe.PEAK_RATE
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert math.isclose(rates[550], recipe.PEAK_RATE / 2, rel_tol=1e-6) and rates[-1] < 1e-5
