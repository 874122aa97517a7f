"""Rows of a table by number."""

import pytest
import torch

from tests.kernels.kernel_cases import Target
from tritonmind.kernels import gather_rows, reference

SHAPES = [(10, 64, 5), (3, 100, 7), (1, 1, 2), (5, 33, 0), (7, 2500, 3)]
LARGE_SHAPES = [(32000, 4096, 64), (513, 5120, 300), (1000, 12345, 17)]


def check(num_rows: int, width: int, num_picked: int, target: Target) -> None:
    table = target.randn(num_rows, width)
    for dtype in (torch.int32, torch.int64):
        rows = torch.randint(0, num_rows, (num_picked,), dtype=dtype)
        expected = reference.gather_rows(table.cpu(), rows)
        assert torch.equal(gather_rows(table, rows.to(target.device)).cpu(), expected)
        out = torch.full((num_picked, width), float("nan"), dtype=target.dtype, device=target.device)
        assert gather_rows(table, rows.to(target.device), out=out) is out
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize(("num_rows", "width", "num_picked"), SHAPES)
def test_gather_rows(num_rows: int, width: int, num_picked: int, target: Target) -> None:
    check(num_rows, width, num_picked, target)


@pytest.mark.parametrize(("num_rows", "width", "num_picked"), LARGE_SHAPES)
def test_large(num_rows: int, width: int, num_picked: int, gpu_target: Target) -> None:
    check(num_rows, width, num_picked, gpu_target)


@pytest.mark.gpu
def test_a_table_of_more_than_2_to_31_elements() -> None:
    table = torch.zeros(2**19 + 1, 4096, dtype=torch.float16, device="cuda")
    table[-1] = torch.arange(4096)
    row = torch.tensor([2**19], dtype=torch.int32, device="cuda")
    assert torch.equal(gather_rows(table, row), table[-1:])


def test_arguments_are_checked() -> None:
    table, rows = torch.randn(4, 8), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="rows has dtype"):
        gather_rows(table, rows.short())
    with pytest.raises(ValueError, match="rows has shape"):
        gather_rows(table, rows.view(1, 2))
    with pytest.raises(ValueError, match=r"table with strides .* is not contiguous"):
        gather_rows(table.t(), rows)
    with pytest.raises(ValueError, match="out has shape"):
        gather_rows(table, rows, out=torch.empty(3, 8))
    with pytest.raises(IndexError):
        gather_rows(table, torch.tensor([4]))
