"""`tritonmind bench accuracy`: its figures against Transformers' logits, spreads, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoints import make_llama_checkpoint
from transformers import LlamaForCausalLM

from tritonmind.chat_template import load_chat_template
from tritonmind.errors import ConfigError, TritonmindError
from tritonmind.tokenizer import Tokenizer
from tritonmind_tools.bench import accuracy
from tritonmind_tools.bench.accuracy_scores import TokenScores, score, summarise
from tritonmind_tools.bench.evaluation import read_texts
from tritonmind_tools.cli import build_parser, main

MAX_LEN = 150  # more than two blocks of the cache
CONVERSATIONS = [
    [("human", "The capital of France? " * 20), ("gpt", "Paris, naïve Größe. " * 30)],
    [("human", "1 + 1"), ("gpt", "2 and 你好,世界 😀")],
    [("human", "x"), ("gpt", "")],  # shorter than what counts
    [("human", "A token stream ends where?"), ("gpt", "Where the model says so, and not before. " * 3)],
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    entries = [{"conversations": [{"from": role, "value": value} for role, value in turns]} for turns in CONVERSATIONS]
    path = tmp_path_factory.mktemp("data") / "heldout.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, LlamaForCausalLM]]:
    """A reference, and two others whose weights are a little off, as two draws of a quantisation would be."""
    directory = tmp_path_factory.mktemp("models")
    made = {}
    for number, name in enumerate(("reference", "first", "second")):
        model = make_llama_checkpoint(directory / name, seed=3, vocab=400)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * number * torch.randn(parameter.shape, generator=generator) * parameter.std()
        model.save_pretrained(directory / name)
        made[name] = (directory / name, model)
    return made


def expected(reference: LlamaForCausalLM, model: LlamaForCausalLM, texts: list[list[int]]) -> dict[str, float]:
    nll: list[torch.Tensor] = []
    kl: list[torch.Tensor] = []
    same: list[torch.Tensor] = []
    with torch.no_grad():
        for ids in texts:
            tokens = torch.tensor([ids])
            ours, theirs = (one(tokens).logits[0, :-1].double().log_softmax(-1) for one in (model, reference))
            nll.append(-ours[range(len(ids) - 1), ids[1:]])
            kl.append(torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1))
            same.append((ours.argmax(-1) == theirs.argmax(-1)).double())
    return {
        "perplexity": math.exp(torch.cat(nll).mean()),
        "divergence": float(torch.cat(kl).mean()),
        "same_top": float(torch.cat(same).mean()),
    }


@pytest.mark.parametrize("way", ["decode", "prefill"])
def test_figures_are_those_of_transformers(
    models: dict[str, Any], data: Path, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: path for name, (path, _) in models.items()}
    arguments = [str(paths["reference"]), f"off={paths['first']}", f"off={paths['second']}", f"{paths['reference']}@8"]
    options = ["--data", str(data), "--via", way, "--max-len", str(MAX_LEN), "--dtype", "fp32", "--num-threads", "1"]
    files = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]
    # Two at a time: the reference reads the texts again beside the third.
    assert main(["bench", "accuracy", *arguments, *options, *files, "--together", "2"]) == 0

    tokenizer = Tokenizer.from_dir(paths["reference"])
    template = load_chat_template(paths["reference"], tokenizer.special_tokens)
    texts = read_texts(data, tokenizer, template, num_texts=9, max_len=MAX_LEN)
    assert len(texts[0]) == MAX_LEN and len(texts) == 3
    assert texts[1] == tokenizer.encode(
        "<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n2 and 你好,世界 😀<|im_end|>\n",
        add_special_tokens=False,
    )
    reference = models["reference"][1]
    wanted = [expected(reference, models[name][1], texts) for name in ("first", "second")]
    results = json.loads((tmp_path / "a.json").read_text())
    first, off, int8 = results["rows"]
    assert [row["label"] for row in results["rows"]] == ["reference", "off", "reference"]
    assert (off["draws"], off["num_texts"], off["num_tokens"]) == (2, 3, sum(len(text) - 1 for text in texts))
    for name in ("perplexity", "divergence", "same_top"):
        values = [figures[name] for figures in wanted]
        assert off[name] == pytest.approx(sum(values) / 2, rel=1e-3), name
        assert off[f"{name}_spread"] == pytest.approx(abs(values[0] - values[1]), rel=1e-2, abs=1e-5), name
        assert [one[name] for one in results["candidates"][1:3]] == pytest.approx(values, rel=1e-3), name
    assert off["divergence"] > 0.01 and off["same_top"] < 1
    base = expected(reference, reference, texts)["perplexity"]
    changes = [figures["perplexity"] / base - 1 for figures in wanted]
    assert off["perplexity_change"] == pytest.approx(sum(changes) / 2, rel=2e-2)
    assert first["perplexity"] == pytest.approx(base, rel=1e-4) and first["divergence"] == 0 and first["same_top"] == 1
    # Both ways read K and V as they are stored: in 8 bits they are off, by little.
    assert (int8["quant_policy"], int8["precision"]) == (8, "fp32+kv8")
    assert 1e-6 < int8["divergence"] < 0.1 * off["divergence"] and int8["same_top"] > 0.9
    assert (off["unit"], off["precision"], off["weights"], off["quant_policy"]) == ("perplexity", "fp32", "fp32", 0)
    with (tmp_path / "a.csv").open() as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == [row["value"] for row in results["rows"]]
    assert f"{100 * off['same_top']:.2f}" in capsys.readouterr().out


def test_standard_error_is_that_of_other_texts() -> None:
    """Against a simulation: texts of very different lengths, whose tokens hang together."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(5, 200, 60)
    text = np.repeat(np.arange(60), lengths)
    zeros = np.zeros(len(text))
    means, errors = [], []
    for _ in range(300):
        nll = 0.02 + np.repeat(rng.normal(0, 0.1, 60), lengths) + rng.normal(0, 0.05, len(text))
        summary = summarise(TokenScores(text, zeros, zeros, zeros), TokenScores(text, nll, zeros, zeros))
        means.append(summary.perplexity_change)
        errors.append(summary.change_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_logits_that_are_not_finite_name_the_model() -> None:
    logits = torch.zeros(2, 5)
    damaged = logits.clone()
    damaged[1, 3] = torch.nan
    targets, texts = torch.tensor([1, 2]), torch.tensor([0, 0])
    with pytest.raises(TritonmindError, match="awq: its logits are not finite"):
        score(logits, damaged, targets, texts, name="awq")


def test_texts_come_in_windows_that_begin_as_prompts_do(models: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(models["reference"][0])
    path = tmp_path / "long.txt"
    path.write_text("The capital of Italy is Rome. " * 40)
    windows = read_texts(path, tokenizer, None, num_texts=3, max_len=50)
    assert [len(window) for window in windows] == [50, 50, 50]
    ids = tokenizer.encode(path.read_text(), add_special_tokens=False)
    assert [*windows[0], *windows[1], *windows[2]] == ids[:150]  # this tokenizer begins prompts with nothing
    path.write_text("Short.")
    with pytest.raises(ConfigError, match=r"long.txt' holds no text of at least 16 tokens"):
        read_texts(path, tokenizer, None, num_texts=3, max_len=50)


def test_candidates_and_their_quant_policies(tmp_path: Path) -> None:
    def candidates(*arguments: str) -> list[tuple[str, str, int | None]]:
        args = build_parser().parse_args(["bench", "accuracy", "ref", *arguments, "--data", "x.txt"])
        return [tuple(candidate) for candidate in accuracy._candidates(args)]

    (tmp_path / "a=b@8").mkdir()
    odd = str(tmp_path / "a=b@8")
    assert candidates() == []
    assert candidates("--quant-policy", "4,8") == [("ref", "ref", 4), ("ref", "ref", 8)]
    assert candidates("awq=./one", "kv=dir/two@8", odd) == [
        ("awq", "./one", None),
        ("kv", "dir/two", 8),
        ("a=b@8", odd, None),
    ]
    assert candidates("one@4", "two", "--quant-policy", "0,8") == [
        ("one", "one", 4),
        ("two", "two", 0),
        ("two", "two", 8),
    ]


def test_what_cannot_be_compared_is_named(
    models: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = str(models["reference"][0])

    def refused(*arguments: str) -> str:
        assert main(["bench", "accuracy", reference, *arguments, "--data", str(data)]) == 1
        return capsys.readouterr().err

    make_llama_checkpoint(tmp_path / "larger", vocab=420)
    assert "larger: vocab_size=420, but the reference has 400" in refused(str(tmp_path / "larger"))
    assert "--quant-policy='8,5'" in refused("--quant-policy", "8,5")
    assert "--max-len=8 must be at least 16" in refused("--max-len", "8")
