"""Masks of tokens that a grammar does not allow, on every implementation."""

import pytest
import torch

from tests.kernels.kernel_cases import Target
from tritonmind.kernels import mask_tokens, mask_words

NUM_ROWS = 5


@pytest.mark.parametrize(("vocab_size", "rows"), [(31, [0]), (64, [4, 0]), (2081, [3, 1, 2]), (33, [])])
def test_masks(vocab_size: int, rows: list[int], target: Target) -> None:
    """Token by token in plain Python. Rows without a mask, and bits beyond the vocabulary, change nothing."""
    logits = target.randn(NUM_ROWS, vocab_size)
    masks = torch.randint(-(2**31), 2**31, (len(rows), mask_words(vocab_size)), dtype=torch.int32)
    expected = logits.cpu().clone()
    for row, words in zip(rows, masks.tolist(), strict=True):
        for token in range(vocab_size):
            if not words[token // 32] >> token % 32 & 1:
                expected[row, token] = -torch.inf
    # Rows lie behind the masks, wherever those end.
    packed = torch.cat((masks.flatten(), torch.tensor(rows, dtype=torch.int32))).to(target.device)
    masks, indices = packed[: masks.numel()].view_as(masks), packed[masks.numel() :]
    mask_tokens(logits, indices, masks)
    assert torch.equal(logits.cpu(), expected)


def test_all_allowed_and_all_forbidden(target: Target) -> None:
    logits = target.randn(2, 70)
    before = logits.clone()
    masks = torch.tensor([[-1, -1, -1], [0, 0, -64]], dtype=torch.int32, device=target.device)
    mask_tokens(logits, torch.arange(2, dtype=torch.int32, device=target.device), masks)
    assert torch.equal(logits[0], before[0]) and (logits[1] == -torch.inf).all()


def test_arguments_are_checked() -> None:
    logits, rows = torch.zeros(3, 40), torch.zeros(2, dtype=torch.int32)
    masks = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"masks has shape \(2, 1\), expected \(2, 2\)"):
        mask_tokens(logits, rows, masks[:, :1].contiguous())
    with pytest.raises(ValueError, match="rows has dtype"):
        mask_tokens(logits, rows.long(), masks)
    with pytest.raises(ValueError, match="masks has shape"):
        mask_tokens(logits, rows[:1], masks)
    with pytest.raises(ValueError, match="not contiguous"):
        mask_tokens(logits, rows, torch.zeros(2, 4, dtype=torch.int32)[:, ::2])
