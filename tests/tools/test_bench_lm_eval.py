"""lm-evaluation-harness on the engine: its answers against Transformers', and the command with a stand-in for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.checkpoints import make_llama_checkpoint
from transformers import LlamaForCausalLM

from tritonmind.engine.llm import LLM
from tritonmind.errors import ConfigError
from tritonmind_tools.bench.lm_eval_adapter import EngineScorer, sampling_params
from tritonmind_tools.cli import main

SESSION_LEN = 40
TEXT = "The capital of France is Paris. " * 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    path = tmp_path_factory.mktemp("model") / "tiny"
    return path, make_llama_checkpoint(path, seed=11)


@pytest.fixture(scope="module")
def scorer(checkpoint: tuple[Path, LlamaForCausalLM]) -> Iterator[EngineScorer]:
    with LLM(str(checkpoint[0]), in_process=True, dtype="fp32", max_model_len=SESSION_LEN, max_num_seqs=4) as llm:
        yield EngineScorer(llm)


@torch.no_grad()
def logprobs(model: LlamaForCausalLM, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token but the first, and whether it is the likeliest."""
    values = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return values[range(len(ids) - 1), ids[1:]], values.argmax(-1) == torch.tensor(ids[1:])


def test_continuations_are_scored_in_their_place(checkpoint: Any, scorer: EngineScorer) -> None:
    model, tokenizer = checkpoint[1], scorer.llm.tokenizer
    context = "The capital of Italy is"
    ids = tokenizer.encode(context, add_special_tokens=False)
    with torch.no_grad():
        likeliest = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    pairs = [(context + " ", "Rome."), (context, tokenizer.decode([likeliest])), ("", "A token"), (TEXT, "Paris")]
    found = scorer.loglikelihood(pairs)

    whole = tokenizer.encode(context + " Rome.", add_special_tokens=False)  # the space belongs to what follows it
    values, _ = logprobs(model, whole)
    assert found[0][0] == pytest.approx(float(values[len(ids) - 1 :].sum()), abs=1e-3)
    if tokenizer.encode(context + tokenizer.decode([likeliest]), add_special_tokens=False) == [*ids, likeliest]:
        assert found[1][1]
    assert not found[0][1]
    alone = [scorer.prefix_token_id, *tokenizer.encode("A token", add_special_tokens=False)]
    assert found[2][0] == pytest.approx(float(logprobs(model, alone)[0].sum()), abs=1e-3)
    cut = tokenizer.encode(TEXT + "Paris", add_special_tokens=False)
    count = len(cut) - len(tokenizer.encode(TEXT.rstrip(), add_special_tokens=False))
    assert len(cut) > SESSION_LEN
    kept, _ = logprobs(model, cut[-(SESSION_LEN - 1) :])
    assert found[3][0] == pytest.approx(float(kept[-count:].sum()), abs=1e-3)
    with pytest.raises(ConfigError, match="needs a session_len of"):
        scorer.loglikelihood([("Why?", TEXT)])


def test_rolling_windows_score_each_token_once_with_all_the_context_there_is(
    checkpoint: Any, scorer: EngineScorer
) -> None:
    ids = [scorer.prefix_token_id, *scorer.llm.tokenizer.encode(TEXT * 2, add_special_tokens=False)]
    window = SESSION_LEN - 1
    assert 2 * window < len(ids)
    expected = float(logprobs(checkpoint[1], ids[:window])[0].sum())
    for done in range(window, len(ids), window - 1):
        end = min(done + window - 1, len(ids))
        values, _ = logprobs(checkpoint[1], ids[end - window : end])
        expected += float(values[-(end - done) :].sum())
    short, long = scorer.loglikelihood_rolling(["A token stream", TEXT * 2])
    assert long == pytest.approx(expected, rel=1e-4)
    assert short == pytest.approx(scorer.loglikelihood([("", "A token stream")])[0][0], abs=1e-3)


def test_generation_ends_where_the_task_says(scorer: EngineScorer) -> None:
    (free,) = scorer.generate_until([("The capital", {"max_gen_toks": 12})])
    end = free[len(free) // 2]
    assert scorer.generate_until([("The capital", {"until": [end], "max_gen_toks": 12})]) == [free.partition(end)[0]]
    params = sampling_params({"until": "\n", "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (params.stop, params.temperature, params.top_p, params.max_tokens) == (("\n",), 0.7, 0.9, 256)
    assert sampling_params({"temperature": 0.7}).temperature == 0.0
    with pytest.raises(ConfigError, match="the task sets num_beams=4"):
        sampling_params({"num_beams": 4})


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in that asks the model one question of each kind, and keeps how it was called."""
    seen: dict[str, Any] = {}

    def simple_evaluate(model: Any, **options: Any) -> dict[str, Any]:
        seen.update(options)
        pairs = [SimpleNamespace(args=("The capital of France is", " Paris")), SimpleNamespace(args=("1 +", " 1"))]
        scores = [value for value, _ in model.loglikelihood(pairs)]
        texts = model.generate_until([SimpleNamespace(args=("A", {"max_gen_toks": 2}))])
        rolled = model.loglikelihood_rolling([SimpleNamespace(args=("A token",))])
        seen.update(scores=scores, texts=texts, chat=model.apply_chat_template([{"role": "user", "content": "Hi"}]))
        figures = {"alias": "t", "nll,none": -sum(scores), "nll_stderr,none": 0.25, "ppl,none": -rolled[0]}
        return {"results": {"mine": {**figures, "ppl_stderr,none": "N/A"}}}

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")}
    modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    modules["lm_eval.api.model"].LM = object  # type: ignore[attr-defined]
    modules["lm_eval.tasks"].TaskManager = (  # type: ignore[attr-defined]
        lambda include_path: SimpleNamespace(all_tasks=["mine"])
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_command_reports_what_the_harness_returns(
    checkpoint: Any, harness: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint[0]), "--tasks", "mine", "--limit", "3", "--dtype", "fp32", "--num-threads", "1"]
    options = ["--engine-options", "session_len=64", "max_batch_size=4", "--json", str(tmp_path / "out.json")]
    assert main(["bench", "lm-eval", *arguments, *options]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["workload"], row["unit"], row["error"]) for row in rows] == [
        ("mine", "nll,none", 0.25),
        ("mine", "ppl,none", 0.0),
    ]
    assert rows[0]["value"] == -sum(harness["scores"]) > 0 and rows[0]["precision"] == "fp32"
    assert (harness["tasks"], harness["limit"]) == (["mine"], 3)
    assert harness["chat"].startswith("<|im_start|>user\nHi<|im_end|>")
    assert main(["bench", "lm-eval", str(checkpoint[0]), "--tasks", "other", *options]) == 1
    assert "lm-eval knows no 'other'" in capsys.readouterr().err


def test_without_the_harness_the_remedy_is_named(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["bench", "lm-eval", str(checkpoint[0]), "--tasks", "mine"]) == 1
    assert "pip install lm-eval" in capsys.readouterr().err
