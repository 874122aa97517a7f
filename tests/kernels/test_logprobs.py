"""Log-probabilities of drawn tokens and of the likeliest ones."""

import pytest
import torch

from tests.kernels.kernel_cases import Target
from tests.tolerances import assert_close
from tritonmind.kernels import reference, token_logprobs

SHAPES = [(1, 37), (3, 300), (2, 1), (0, 64), (2, 4100)]
LARGE_SHAPES = [(1, 128256), (64, 32000), (33, 49152), (256, 32003)]


def check(num_rows: int, vocab_size: int, num_top: int, target: Target) -> None:
    logits = 4 * target.randn(num_rows, vocab_size) + 30
    token_ids = torch.randint(0, vocab_size, (num_rows,))
    expected = reference.token_logprobs(logits.cpu(), token_ids, num_top=num_top)
    actual = token_logprobs(logits, token_ids.to(target.device), num_top=num_top)
    # Logits are taken as they are, whatever their dtype: the result is as exact as fp32. One less, so that a likely
    # token's is not near zero, where its error is that of much larger logits.
    assert_close(actual.chosen.cpu() - 1, expected.chosen - 1)
    assert actual.ranks.tolist() == expected.ranks.tolist()
    assert_close(actual.top_logprobs.cpu() - 1, expected.top_logprobs - 1)
    assert actual.top_ids.shape == (num_rows, num_top) and actual.top_ids.dtype == torch.int64
    logprobs = logits.cpu().float().log_softmax(1)
    assert_close(actual.top_logprobs.cpu() - 1, logprobs.gather(1, actual.top_ids.cpu()) - 1)
    assert all(len(set(ids)) == num_top for ids in actual.top_ids.tolist())


@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_token_logprobs(num_rows: int, vocab_size: int, num_top: int, target: Target) -> None:
    check(num_rows, vocab_size, min(num_top, vocab_size), target)


@pytest.mark.parametrize(("num_rows", "vocab_size"), LARGE_SHAPES)
def test_large(num_rows: int, vocab_size: int, gpu_target: Target) -> None:
    check(num_rows, vocab_size, 20, gpu_target)


def test_masked_tokens(target: Target) -> None:
    """-inf in most of a row: no lane that meets nothing else spoils the sum."""
    logits = torch.full((2, 5000), -float("inf"))
    logits[0, 4321], logits[0, 4999], logits[1, 3] = 3.0, 2.0, -60000.0
    token_ids = torch.tensor([4999, 0], device=target.device)
    actual = token_logprobs(logits.to(target.device, target.dtype), token_ids, num_top=2)
    assert actual.chosen[0].item() == pytest.approx(-1.3132617, rel=1e-6)
    assert actual.chosen[1].item() == -float("inf")
    assert actual.ranks.tolist() == [2, 2]
    assert actual.top_ids[0].tolist() == [4321, 4999] and actual.top_ids[1, 0] == 3
    assert actual.top_logprobs[1].tolist() == [0.0, -float("inf")]


def test_a_row_does_not_depend_on_the_batch(target: Target) -> None:
    logits, token_ids = target.randn(5, 304), torch.arange(5, device=target.device)
    batch = token_logprobs(logits, token_ids).chosen
    for row in (0, 4):
        assert torch.equal(token_logprobs(logits[row : row + 1], token_ids[row : row + 1]).chosen[0], batch[row])


def test_arguments_are_checked() -> None:
    logits, token_ids = torch.randn(2, 8), torch.tensor([0, 7])
    with pytest.raises(ValueError, match="token_ids has dtype"):
        token_logprobs(logits, token_ids.int())
    with pytest.raises(ValueError, match="token_ids has shape"):
        token_logprobs(logits, token_ids[:1])
    for num_top in (-1, 9):
        with pytest.raises(ValueError, match=f"num_top is {num_top}, expected 0 to 8"):
            token_logprobs(logits, token_ids, num_top=num_top)
