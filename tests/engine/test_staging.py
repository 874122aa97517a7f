"""The packed inputs of a step: parts do not overlap, lengths vary, device and host agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tritonmind.engine.staging import NUM_BUFFERS, StepStaging

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("num_tokens", "num_writes"), [(1, 0), (3, 1), (40, 33), (41, 7)])
def test_every_word_arrives_where_the_device_reads_it(device: str, num_tokens: int, num_writes: int) -> None:
    staging = StepStaging(max_num_seqs=7, max_num_tokens=41, max_table_writes=33, device=torch.device(device))
    for round_number in range(5):  # more rounds than buffers
        head = staging.begin()
        tail = staging.plan_tail(num_tokens, num_writes)
        parts = [*head, *staging.host_tail(tail)]
        for number, part in enumerate(parts):
            part[...] = 1000 * round_number + 100 * number + np.arange(part.size).reshape(part.shape)
        expected = [part.copy() for part in parts]
        staging.send(tail)
        arrived = [*staging.device_head, *staging.device_tail(tail)]
        for want, got in zip(expected, arrived, strict=True):
            assert np.array_equal(got.cpu().numpy(), want)
        staging.finish(torch.zeros(7, dtype=torch.int64, device=device), 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_decodes_sends_its_head_and_gets_its_draw(device: str) -> None:
    staging = StepStaging(max_num_seqs=7, max_num_tokens=41, max_table_writes=33, device=torch.device(device))
    for round_number in range(5):
        head = staging.begin()
        for number, part in enumerate(head):
            part[...] = 1000 * round_number + 100 * number + np.arange(part.size).reshape(part.shape)
        expected = [part.copy() for part in head]
        staging.send_head()
        for want, got in zip(expected, staging.device_head, strict=True):
            assert np.array_equal(got.cpu().numpy(), want)
        drawn = torch.arange(7, device=device) + round_number
        draw = staging.finish(drawn, 5)
        drawn.fill_(-1)  # in the order of the stream
        assert draw.wait() == [round_number + row for row in range(5)], "the next step's draw came through"


def test_a_step_that_is_not_finished_is_our_mistake() -> None:
    """Its memory would be written while the device may still read it."""
    staging = StepStaging(max_num_seqs=4, max_num_tokens=8, max_table_writes=4, device=torch.device("cpu"))
    staging.begin()
    with pytest.raises(AssertionError, match="never finished"):
        staging.begin()


def test_padding_is_reset() -> None:
    staging = StepStaging(max_num_seqs=4, max_num_tokens=4, max_table_writes=4, device=torch.device("cpu"))
    for _ in range(2):
        head = staging.begin()
        assert (head.context_lens == 0).all() and (head.sample_slots == -1).all() and (head.seq_slots == 0).all()
        for part in head:
            part[...] = 5
        staging.finish(torch.zeros(4, dtype=torch.int64), 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_the_same_members_goes_on_where_theirs_left_off(device: str) -> None:
    """Each buffer for itself; what others had in between is not taken for theirs."""
    staging = StepStaging(max_num_seqs=4, max_num_tokens=8, max_table_writes=4, device=torch.device(device))
    drawn = torch.zeros(4, dtype=torch.int64, device=device)
    num_buffers = 1 if device == "cpu" else NUM_BUFFERS
    members, others = object(), object()
    for number in range(num_buffers):
        assert staging.resume(members) is None
        staging.begin(members).seq_slots[:] = 10 + number
        staging.finish(drawn, 0)
    for number in range(num_buffers):
        head = staging.resume(members)
        assert head is not None and (head.seq_slots == 10 + number).all()
        staging.finish(drawn, 0)
    for other in (others, None):
        assert staging.resume(others) is None
        staging.begin(*([] if other is None else [other]))
        staging.finish(drawn, 0)
        for _ in range(num_buffers - 1):
            assert staging.resume(members) is not None
            staging.finish(drawn, 0)
        assert staging.resume(members) is None
        staging.begin(members)
        staging.finish(drawn, 0)
        for _ in range(num_buffers - 1):
            assert staging.resume(members) is not None
            staging.finish(drawn, 0)


def test_a_step_beyond_its_limits_is_our_mistake() -> None:
    staging = StepStaging(max_num_seqs=4, max_num_tokens=8, max_table_writes=4, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="larger than its limits"):
        staging.plan_tail(200, 4)
