"""Block table entries and token inputs, on every implementation."""

import pytest
import torch

from tests.kernels.kernel_cases import Target
from tritonmind.kernels import DecodeInputs, TokenInputs, prepare_decodes, prepare_tokens, write_block_tables

NUM_SLOTS = 5
BLOCK_SIZE = 16


def ints(values: list[int], target: Target) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=target.device)


@pytest.mark.parametrize("count", [0, 1, 7, 128, 300])
def test_block_table_entries(count: int, target: Target) -> None:
    before = torch.randint(0, 100, (NUM_SLOTS, 70), dtype=torch.int32)
    indices = torch.randperm(before.numel())[:count].to(torch.int32)
    blocks = torch.randint(1000, 2000, (count,), dtype=torch.int32)
    expected = before.clone()
    for index, block in zip(indices.tolist(), blocks.tolist(), strict=True):
        expected[index // 70, index % 70] = block
    tables = before.to(target.device)
    write_block_tables(tables, indices.to(target.device), blocks.to(target.device))
    assert torch.equal(tables.cpu(), expected)


@pytest.mark.parametrize("num_tokens", [1, 5, 128, 400])
def test_tokens(num_tokens: int, target: Target) -> None:
    """Each token one by one in plain Python: known ids, ids that only the device has, and padding."""
    token_ids = torch.randint(0, 1000, (num_tokens,)).where(torch.rand(num_tokens) < 0.6, -1).tolist()
    positions = torch.randint(0, 4 * BLOCK_SIZE, (num_tokens,)).where(torch.rand(num_tokens) < 0.8, -1).tolist()
    slots = torch.randint(0, NUM_SLOTS, (num_tokens,)).tolist()
    last = torch.randint(0, 2**40, (NUM_SLOTS,))
    tables = torch.randint(0, 10_000, (NUM_SLOTS, 4), dtype=torch.int32)
    expected = []
    for token_id, position, slot in zip(token_ids, positions, slots, strict=True):
        if position < 0:
            expected.append((0, 0, -1))
            continue
        block = int(tables[slot, position // BLOCK_SIZE])
        known = token_id if token_id >= 0 else int(last[slot])
        expected.append((known, position, block * BLOCK_SIZE + position % BLOCK_SIZE))

    # Staged arrays begin anywhere.
    staged = [torch.cat((ints([0] * 3, target), ints(values, target)))[3:] for values in (token_ids, positions, slots)]
    out = TokenInputs(
        torch.full((num_tokens,), -7, dtype=torch.int64, device=target.device),
        torch.full((num_tokens,), -7, dtype=torch.int64, device=target.device),
        torch.full((num_tokens,), -7, dtype=torch.int32, device=target.device),
    )
    result = prepare_tokens(*staged, last.to(target.device), tables.to(target.device), block_size=BLOCK_SIZE, out=out)
    actual = list(zip(*(tensor.tolist() for tensor in result), strict=True))
    padding = [position < 0 for position in positions]
    assert [row[1:] for row in actual] == [row[1:] for row in expected]
    assert [row for row, pad in zip(actual, padding, strict=True) if not pad] == [
        row for row, pad in zip(expected, padding, strict=True) if not pad
    ]
    assert all(0 <= row[0] < 2**40 for row in actual), "padding is embedded too: its id must be one"


def empty_tokens(num_rows: int, target: Target) -> TokenInputs:
    return TokenInputs(
        torch.full((num_rows,), -7, dtype=torch.int64, device=target.device),
        torch.full((num_rows,), -7, dtype=torch.int64, device=target.device),
        torch.full((num_rows,), -7, dtype=torch.int32, device=target.device),
    )


@pytest.mark.parametrize("max_blocks", [3, 128, 300])
@pytest.mark.parametrize("num_padding", [0, 4])
def test_decodes(max_blocks: int, num_padding: int, target: Target) -> None:
    """Rows one by one in plain Python; tables as they were but for the new blocks; padding touches nothing."""
    num_slots, num_rows = 9, 7
    before = torch.randint(0, 10_000, (num_slots, max_blocks), dtype=torch.int32)
    last = torch.randint(0, 2**40, (num_slots,))
    # On the first and the last token of a page, of the first and of the last page.
    lengths = [1, 2, BLOCK_SIZE, BLOCK_SIZE + 1, max_blocks * BLOCK_SIZE, (max_blocks - 1) * BLOCK_SIZE + 1, 20]
    slots = torch.randperm(num_slots)[:num_rows].tolist()
    token_ids = [5, -1, -1, 7, -1, -1, -1]
    new_blocks = [20_000 + row if length % BLOCK_SIZE == 1 else -1 for row, length in enumerate(lengths)]
    tables, expected = before.clone(), []
    for row, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        page, offset = divmod(length - 1, BLOCK_SIZE)
        if new_blocks[row] >= 0:
            tables[slot, page] = new_blocks[row]
        token_id = token_ids[row] if token_ids[row] >= 0 else int(last[slot])
        expected.append((token_id, length - 1, int(tables[slot, page]) * BLOCK_SIZE + offset))
    expected += [(0, 0, -1)] * num_padding

    staged = [ints(values + [fill] * num_padding, target) for values, fill in (
        (token_ids, 3), (lengths, 0), (slots, slots[0]), (new_blocks, 77)
    )]  # fmt: skip
    on_device = before.to(target.device)
    out = DecodeInputs(
        empty_tokens(num_rows + num_padding, target),
        torch.full((num_rows + num_padding, max_blocks), -7, dtype=torch.int32, device=target.device),
    )
    prepare_decodes(*staged, last.to(target.device), on_device, block_size=BLOCK_SIZE, out=out)
    assert list(zip(*(tensor.tolist() for tensor in out.tokens), strict=True)) == expected
    assert torch.equal(on_device.cpu(), tables)
    for row, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        num_pages = -(-length // BLOCK_SIZE)
        assert torch.equal(out.block_tables[row, :num_pages].cpu(), tables[slot, :num_pages])
    assert (out.block_tables[num_rows:] == -7).all()


LIMITS = [20, 40]


def test_positions_where_frequencies_depend_on_the_length(target: Target) -> None:
    """Behind the tables of the limits that a sequence exceeds: a decode's by its context, a prompt's as it is told."""
    last = torch.randint(0, 1000, (NUM_SLOTS,)).to(target.device)
    tables = torch.randint(0, 10_000, (NUM_SLOTS, 4), dtype=torch.int32)
    positions, slots, exceeded = [0, 3, 19, 39, -1, 41, 0], [1, 2, 2, 4, 0, 3, 3], [0, 1, 0, 1, 0, 2, 2]
    codes = [slot + NUM_SLOTS * count for slot, count in zip(slots, exceeded, strict=True)]
    out = prepare_tokens(
        ints([7] * 7, target), ints(positions, target), ints(codes, target), last, tables.to(target.device),
        block_size=BLOCK_SIZE, rope_limits=ints(LIMITS, target), out=empty_tokens(7, target),
    )  # fmt: skip
    assert out.positions.tolist() == [0, 23, 19, 59, 0, 101, 60]
    for index in (0, 1, 2, 3, 5, 6):
        block = int(tables[slots[index], positions[index] // BLOCK_SIZE])
        assert out.slot_mapping[index] == block * BLOCK_SIZE + positions[index] % BLOCK_SIZE

    lengths = [0, 1, 20, 21, 41]
    decodes = prepare_decodes(
        ints([7] * 5, target), ints(lengths, target), ints([0, 1, 2, 3, 4], target), ints([-1] * 5, target), last,
        tables.to(target.device), block_size=BLOCK_SIZE, rope_limits=ints(LIMITS, target),
        out=DecodeInputs(empty_tokens(5, target), torch.zeros(5, 4, dtype=torch.int32, device=target.device)),
    )  # fmt: skip
    assert decodes.tokens.positions.tolist() == [0, 0, 19, 40, 100]


def test_arguments_are_checked() -> None:
    tables = torch.zeros(2, 4, dtype=torch.int32)
    index = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="blocks has shape"):
        write_block_tables(tables, index, index[:2])
    with pytest.raises(ValueError, match="indices has dtype"):
        write_block_tables(tables, index.long(), index)
    out = TokenInputs(index.long(), index.long(), index.clone())
    last = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="last_token_ids has shape"):
        prepare_tokens(index, index, index, last[:1], tables, block_size=16, out=out)
    with pytest.raises(ValueError, match=r"out.positions has dtype"):
        prepare_tokens(index, index, index, last, tables, block_size=16, out=out._replace(positions=index))
    tokens, ends = TokenInputs(index.long(), index.long(), index.clone()), index + 1
    with pytest.raises(ValueError, match=r"out.block_tables has shape"):
        prepare_decodes(index, ends, index, index, last, tables, block_size=16, out=DecodeInputs(tokens, tables))
    with pytest.raises(ValueError, match="new_blocks has dtype"):
        prepare_decodes(index, ends, index, index.long(), last, tables, block_size=16, out=DecodeInputs(tokens, tables))
