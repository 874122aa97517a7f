"""Changes to single logits, on every implementation."""

import pytest
import torch

from tests.kernels.kernel_cases import Target
from tritonmind.kernels import edit_logits

VOCAB = 71


@pytest.mark.parametrize("count", [0, 1, 9, 200])
def test_edits(count: int, target: Target) -> None:
    """One by one in plain Python: with a condition that holds, with one that does not, without one."""
    num_rows, num_slots = 5, 8
    slots = torch.randperm(num_slots)[:num_rows].int()
    last = torch.randint(0, 5, (num_slots,))
    pairs = torch.randperm(num_rows * VOCAB)[:count]
    rows, token_ids = (pairs // VOCAB).int(), (pairs % VOCAB).int()
    values = torch.where(torch.rand(count) < 0.3, -torch.inf, 5 * torch.randn(count))
    conditions = torch.where(torch.rand(count) < 0.5, -1, torch.randint(0, 5, (count,))).int()
    logits = target.randn(num_rows, VOCAB)
    expected = logits.cpu().clone()
    for row, token_id, value, condition in zip(
        rows.tolist(), token_ids.tolist(), values.tolist(), conditions.tolist(), strict=True
    ):
        if condition in (-1, int(last[slots[row]])):
            expected[row, token_id] = (expected[row, token_id].float() + value).to(expected.dtype)
    device = target.device
    staged = [torch.cat((part[:0], part)).to(device) for part in (rows, token_ids, values, conditions)]
    edit_logits(logits, *staged, slots.to(device), last.to(device))
    assert torch.equal(logits.cpu(), expected)


def test_a_ban_may_come_twice(target: Target) -> None:
    logits = target.randn(1, VOCAB)
    device = target.device
    edit_logits(
        logits,
        torch.zeros(4, dtype=torch.int32, device=device),
        torch.tensor([3, 3, 3, 4], dtype=torch.int32, device=device),
        torch.full((4,), -torch.inf, device=device),
        torch.tensor([-1, 6, 7, 7], dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.tensor([6], device=device),
    )
    assert logits[0, 3] == -torch.inf and logits[0, 4].isfinite() and logits[0, :3].isfinite().all()


def test_arguments_are_checked() -> None:
    index, logits = torch.zeros(2, dtype=torch.int32), torch.zeros(1, 4)
    last = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="values has dtype"):
        edit_logits(logits, index, index, index, index, index[:1], last)
    with pytest.raises(ValueError, match="slots has shape"):
        edit_logits(logits, index, index, index.float(), index, index, last)
    with pytest.raises(ValueError, match="conditions has shape"):
        edit_logits(logits, index, index, index.float(), index[:1], index[:1], last)
