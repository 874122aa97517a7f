"""How far a model's predictions are from a reference's: by token, and what all of them come to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tritonmind.errors import TritonmindError

if TYPE_CHECKING:
    import torch

HIGH_PERCENTILE = 99


class TokenScores(NamedTuple):
    """Of each token predicted, [num_tokens].

    text: the number of its text. nll: -log of the probability that the model gave it, nats. divergence: KL(reference ||
    model) over the whole vocabulary, nats. same_top: whether both hold the same token the likeliest.
    """

    text: np.ndarray
    nll: np.ndarray
    divergence: np.ndarray
    same_top: np.ndarray

    @classmethod
    def joined(cls, parts: list[TokenScores]) -> TokenScores:
        return cls(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class Summary(NamedTuple):
    """A model against the reference over all tokens.

    perplexity_change: perplexity over the reference's, less 1; change_error: the standard error of that over texts, as
    other texts would have it. divergence, high_divergence: mean and 99th percentile, nats. same_top: share of tokens.
    """

    perplexity: float
    perplexity_change: float
    change_error: float
    divergence: float
    high_divergence: float
    same_top: float


def score(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, texts: torch.Tensor, *, name: str
) -> TokenScores:
    """reference, logits: [num_tokens, vocab_size] fp32. Raises TritonmindError naming the model for NaN or Inf."""
    expected, found = reference.log_softmax(-1), logits.log_softmax(-1)
    nll = -found.gather(1, targets[:, None]).squeeze(1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    if not bool((nll.isfinite() & divergence.isfinite()).all()):
        raise TritonmindError(f"{name}: its logits are not finite: the weights or the KV scales are damaged")
    same_top = reference.argmax(-1) == logits.argmax(-1)
    return TokenScores(texts.numpy(), *(tensor.cpu().numpy() for tensor in (nll, divergence, same_top)))


def summarise(reference: TokenScores, scores: TokenScores) -> Summary:
    """Perplexity is that of all tokens together. The change is taken token by token, so that texts cancel out."""
    assert len(reference.nll) == len(scores.nll)
    difference = scores.nll.astype(np.float64) - reference.nll
    change = difference.mean()
    _, text = np.unique(scores.text, return_inverse=True)
    # Tokens of a text hang together, texts do not: the error of the mean from each text's sum about what the mean
    # would give it.
    sums = np.bincount(text, difference - change)
    num_texts = len(sums)
    error = math.sqrt(float((sums**2).sum()) * num_texts / (num_texts - 1)) / len(difference) if num_texts > 1 else 0.0
    ratio = math.exp(change)
    return Summary(
        perplexity=math.exp(scores.nll.astype(np.float64).mean()),
        perplexity_change=ratio - 1,
        change_error=ratio * error,
        divergence=float(scores.divergence.astype(np.float64).mean()),
        high_divergence=float(np.percentile(scores.divergence, HIGH_PERCENTILE)),
        same_top=float(scores.same_top.mean()),
    )
