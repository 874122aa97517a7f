"""Options that change or report logits, through the whole engine, with and without a step in flight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_llama_checkpoint
from tests.workspaces import convert
from tritonmind.engine.llm import LLM, Completion
from tritonmind.sampling_params import SamplingParams
from tritonmind.tokenizer import Tokenizer

PROMPTS = [[5, 6, 7], [8] * 70, list(range(3, 40))]
NUM_TOKENS = 24

DEVICES = [("cpu", 0), ("cpu", 1), pytest.param(("cuda", 1), marks=pytest.mark.gpu)]


class Served:
    """A tiny model in the engine, and in Transformers."""

    def __init__(self, directory: Path, device: str, async_depth: int, **overrides: Any) -> None:
        self.reference = make_llama_checkpoint(directory / "checkpoint", seed=11, head_dim=64, hidden=128).to(device)
        self.device, self.async_depth = device, async_depth
        path = convert(directory / "checkpoint", directory / "workspace", "--weight-type", "fp32")
        self.llm = LLM(
            str(path),
            in_process=True,
            device=device,
            **{"cache_max_entry_count": 60, "max_num_batched_tokens": 64, "max_num_seqs": 4, **overrides},
            async_depth=async_depth,
        )

    def generate(self, **options: Any) -> list[Completion]:
        options = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True, **options}
        answers = self.llm.generate(PROMPTS, SamplingParams(**options))
        self.llm.engine.check_integrity()
        return answers

    @torch.no_grad()
    def logits(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """The reference's before each token of an answer, [len(answer), vocab_size]."""
        ids = torch.tensor([prompt + answer], device=self.device)
        return self.reference(ids).logits[0, len(prompt) - 1 : -1].cpu()


@pytest.fixture(scope="module", params=DEVICES, ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("options"), *request.param)
    yield served
    served.llm.close()


def test_logit_bias_is_added_at_every_position(served: Served) -> None:
    bias = {17: 4.0, 200: -3.0, 33: 100.0}
    for prompt, answer in zip(PROMPTS, served.generate(logit_bias={17: 4.0, 200: -3.0}), strict=True):
        logits = served.logits(prompt, answer.token_ids)
        logits[:, 17] += 4.0
        logits[:, 200] -= 3.0
        assert answer.token_ids == logits.argmax(1).tolist()
    assert all(answer.token_ids == [33] * NUM_TOKENS for answer in served.generate(logit_bias=bias))


def test_min_tokens_holds_every_stop_token_back(served: Served) -> None:
    stops = {answer.token_ids[3] for answer in served.generate()}
    early = served.generate(stop_token_ids=tuple(stops))
    assert any(len(answer.token_ids) < 10 for answer in early)
    for prompt, answer in zip(PROMPTS, served.generate(stop_token_ids=tuple(stops), min_tokens=10), strict=True):
        assert len(answer.token_ids) >= 10
        assert not stops & set(answer.token_ids[:10])
        logits = served.logits(prompt, answer.token_ids)
        logits[:10, list(stops)] = -torch.inf
        assert answer.token_ids == logits.argmax(1).tolist()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_bad_words_never_come(served: Served, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of ids that the free answers have: each is completed nowhere, and nothing else is changed."""
    free = [answer.token_ids for answer in served.generate()]
    words = [ids[5 : 5 + length] for ids in free]
    # A random model's ids are not how a tokenizer would write their text.
    monkeypatch.setattr(Tokenizer, "encode_word", lambda self, text: words)
    answers = served.generate(bad_words=("text",))
    assert all(answer.token_ids != ids for answer, ids in zip(answers, free, strict=True))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = prompt + answer.token_ids
        logits = served.logits(prompt, answer.token_ids)
        for row in range(len(logits)):
            before = ids[: len(prompt) + row]
            for word in words:
                if len(word) == 1 or before[-len(word) + 1 :] == word[:-1]:
                    logits[row, word[-1]] = -torch.inf
        assert answer.token_ids == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    "options", [{}, {"logit_bias": {17: 50.0}}, {"temperature": 0.8, "top_k": 5, "seed": 3}], ids=str
)
def test_logprobs_are_those_of_the_model_whatever_was_done_to_the_draw(served: Served, options: dict[str, Any]) -> None:
    for prompt, answer in zip(PROMPTS, served.generate(num_logprobs=4, **options), strict=True):
        assert answer.logprobs is not None and len(answer.logprobs) == NUM_TOKENS
        expected = served.logits(prompt, answer.token_ids).log_softmax(1)
        top = expected.topk(4)
        for row, (token_id, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            assert logprob.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-3)
            assert logprob.rank == 1 + int((expected[row] > expected[row, token_id] + 1e-4).sum())
            assert [other for other, _ in logprob.top] == top.indices[row].tolist()
            assert [value for _, value in logprob.top] == pytest.approx(top.values[row].tolist(), abs=1e-3)


def test_rows_with_and_without_logprobs_share_a_batch(served: Served) -> None:
    alone = served.generate(num_logprobs=2)
    assert all(answer.logprobs is None for answer in served.generate())
    zero = served.generate(num_logprobs=0)
    for one, other in zip(alone, zero, strict=True):
        assert one.logprobs is not None and other.logprobs is not None
        assert all(logprob.top == [] for logprob in other.logprobs)
        assert [a.logprob for a in one.logprobs] == pytest.approx([b.logprob for b in other.logprobs], abs=1e-4)


def test_n_answers_have_their_own_seeds_and_one_prompt(served: Served) -> None:
    options = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, "seed": 2**64 - 2}
    prompts = [[9, *prompt] for prompt in PROMPTS]  # in no cache
    together = served.llm.generate(prompts, SamplingParams(n=3, **options))
    served.llm.engine.check_integrity()
    assert len(together) == 9
    for number, prompt in enumerate(prompts):
        answers = together[3 * number : 3 * number + 3]
        for index, answer in enumerate(answers):
            seed = (2**64 - 2 + index) % 2**64
            (alone,) = served.llm.generate([prompt], SamplingParams(**{**options, "seed": seed}))
            assert answer.token_ids == alone.token_ids
            assert answer.num_cached_tokens == (len(prompt) - 1) // 64 * 64 * (index > 0)
        assert len({tuple(answer.token_ids) for answer in answers}) == 3


def test_logprobs_of_the_prompt(served: Served) -> None:
    """Of prompts in several chunks, twice, so that the second time all of it is in the prefix cache."""
    for _ in range(2):
        answers = served.generate(num_prompt_logprobs=3, max_tokens=4)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer.num_cached_tokens == 0
            assert answer.prompt_logprobs is not None and len(answer.prompt_logprobs) == len(prompt)
            assert answer.prompt_logprobs[0] is None
            with torch.no_grad():
                logits = served.reference(torch.tensor([prompt], device=served.device)).logits[0, :-1].cpu()
            expected = logits.log_softmax(1)
            for row, logprob in enumerate(answer.prompt_logprobs[1:]):
                assert logprob is not None
                assert logprob.logprob == pytest.approx(float(expected[row, prompt[row + 1]]), abs=1e-3)
                assert [value for _, value in logprob.top] == pytest.approx(
                    expected[row].topk(3).values.tolist(), abs=1e-3
                )
    assert all(answer.prompt_logprobs is None for answer in served.generate(max_tokens=2))
