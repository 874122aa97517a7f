"""Prompts and decodes in one step: nobody stands still; and what the scheduler's integrity check finds."""

from __future__ import annotations

import pytest

from tests.engine.driver import Driver, request
from tritonmind.engine.hold_back import MANY_DECODES, MAX_HELD_STEPS, MIN_SHARED_TOKENS


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prompt_of_32k_stalls_nobody(depth: int) -> None:
    """While it is computed each decode has a token in each step, and prompts that come have their first soon."""
    budget, long = 4096, 32_000
    driver = Driver(
        num_blocks=900, depth=depth, max_num_seqs=64, budget=budget, max_model_len=33_000, block_size=64, caching=False
    )
    for number in range(8):
        driver.scheduler.add(request(number, [number] * 100, 60))
    for _ in range(3):
        driver.step()
    driver.scheduler.add(request(8, [7] * long, 2))
    started: dict[int, int] = {}
    num_steps = 0
    while 8 not in driver.tokens:
        number = 9 + num_steps
        driver.scheduler.add(request(number, [number] * 1500, 60))
        decoding = {seq.request_id: len(driver.tokens[seq.request_id]) for seq in driver.scheduler.decoding}
        driver.step()
        num_steps += 1
        for request_id, before in decoding.items():
            assert len(driver.tokens[request_id]) == before + 1, "a decode had no token in a step"
        for request_id in driver.tokens:
            started.setdefault(request_id, num_steps)
    assert driver.executor.max_tokens_in_a_step <= budget
    assert num_steps <= long // (budget // 2) + 3 + depth, "others took more than half of its steps"
    waited = [started[number] - (number - 8) for number in range(9, 9 + num_steps - 3)]
    assert max(waited) <= 2 + depth, "a short prompt waited for the long one"


def test_a_flood_of_short_prompts_leaves_a_long_one_half_of_each_step() -> None:
    budget, long = 4096, 32_000
    driver = Driver(num_blocks=2000, depth=0, max_num_seqs=64, budget=budget, max_model_len=33_000, block_size=64)
    driver.scheduler.add(request(0, [7] * long, 2))
    num_steps = 0
    while not driver.tokens[0]:
        for number in range(3):
            driver.scheduler.add(request(1 + 3 * num_steps + number, [num_steps, number] * 750, 1))
        driver.step()
        num_steps += 1
        assert num_steps <= long // (budget // 2) + 1, "the long prompt starves"
    assert len(driver.finals) >= num_steps, "the others stood still"


def test_a_long_prompt_alone_has_whole_steps() -> None:
    driver = Driver(num_blocks=40, depth=0, budget=8)
    driver.scheduler.add(request(0, list(range(33)), 2))
    for _ in range(5):
        assert not driver.tokens[0]
        driver.step()
    assert len(driver.tokens[0]) == 1


def test_prompts_come_in_turn_unless_one_is_long() -> None:
    """Equal prompts do not share a step: the first of them would have its answer as late as the last."""
    driver = Driver(num_blocks=80, depth=0, max_num_seqs=8, budget=15)
    for number in range(4):
        driver.scheduler.add(request(number, [number] * 12, 20))
    for number in range(4):
        driver.step()
        assert driver.tokens[number], "a prompt behind it took of its step"


def _many_decodes(num_decodes: int, *, depth: int = 0, holds_back: bool = True) -> Driver:
    """One in which so many sequences decode, with slots for some more."""
    driver = Driver(
        num_blocks=900, depth=depth, max_num_seqs=num_decodes + 8, budget=4096, max_model_len=3000, block_size=64,
        holds_back=holds_back,
    )  # fmt: skip
    for number in range(num_decodes):
        driver.scheduler.add(request(number, [number], 40))
    for _ in range(1 + depth):
        driver.step()
    assert len(driver.scheduler.decoding) == num_decodes
    return driver


def _steps_until_first(driver: Driver, request_id: int) -> int:
    """Steps until the request has a token; in each of them every decode has one."""
    num_steps = 0
    while not driver.tokens[request_id]:
        before = {seq.request_id: len(driver.tokens[seq.request_id]) for seq in driver.scheduler.decoding}
        driver.step()
        num_steps += 1
        assert all(len(driver.tokens[known]) == count + 1 for known, count in before.items()), "a decode stood still"
    return num_steps


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("num_decodes", "lengths", "num_held"),
    [
        (MANY_DECODES - 1, [100], 0),  # few decodes: at once
        (MANY_DECODES, [100], MAX_HELD_STEPS),
        (MANY_DECODES, [1, 100, 300], MAX_HELD_STEPS),
        (MANY_DECODES, [MIN_SHARED_TOKENS - 100, 100], 0),  # together enough
        (MANY_DECODES, [2500], 0),
    ],
    ids=str,
)
def test_beside_many_decodes_few_tokens_wait_for_others(
    num_decodes: int, lengths: list[int], num_held: int, depth: int
) -> None:
    driver = _many_decodes(num_decodes, depth=depth)
    for number, length in enumerate(lengths):
        driver.scheduler.add(request(1000 + number, [number] * length, 40))
    assert _steps_until_first(driver, 1000) == num_held + 1 + depth
    assert all(driver.tokens[1000 + number] for number in range(len(lengths))), "they did not share a step"
    driver.run()


def test_prompts_that_come_later_share_the_step_that_others_wait_for() -> None:
    driver = _many_decodes(MANY_DECODES)
    driver.scheduler.add(request(1000, [7] * 50, 40))
    driver.step()
    driver.scheduler.add(request(1001, [8] * 50, 40))
    assert _steps_until_first(driver, 1001) == MAX_HELD_STEPS
    assert len(driver.tokens[1000]) == 1, "each had a step of its own"
    # What comes after them waits as long again, but for enough of others.
    driver.scheduler.add(request(1002, [9] * 50, 40))
    driver.step()
    assert not driver.tokens[1002]
    driver.scheduler.add(request(1003, [10] * MIN_SHARED_TOKENS, 40))
    assert _steps_until_first(driver, 1002) == 1
    driver.run()


def test_where_steps_with_prompts_have_no_price_none_waits() -> None:
    driver = _many_decodes(MANY_DECODES, holds_back=False)
    driver.scheduler.add(request(1000, [7] * 100, 40))
    assert _steps_until_first(driver, 1000) == 1
    driver.run()


def test_without_a_free_slot_nothing_is_held_back_for_long() -> None:
    """Steps in which nothing could come do not count, and the first that can come waits for the usual time."""
    driver = _many_decodes(MANY_DECODES)
    for number in range(8):
        driver.scheduler.add(request(1000 + number, [number] * 200, 3))
    _steps_until_first(driver, 1007)
    driver.scheduler.add(request(2000, [9] * 50, 2))
    while len(driver.scheduler.running) == MANY_DECODES + 8:
        driver.step()
        assert not driver.tokens[2000]
    assert _steps_until_first(driver, 2000) <= MAX_HELD_STEPS + 1
    driver.run()


@pytest.mark.parametrize(
    "column",
    ["_slots", "_starts", "_token_ids", "_capacities", "_last_starts", "_marks", "_request_ids"],
)
def test_the_integrity_check_finds_a_wrong_column(column: str) -> None:
    driver = Driver(num_blocks=40, depth=1)
    for number in range(3):
        driver.scheduler.add(request(number, [number] * (5 + number), 20))
    for _ in range(5):
        driver.step()
    driver.scheduler.check_integrity()
    values = getattr(driver.scheduler._decoding, column)
    values[1] += 1
    with pytest.raises(AssertionError):
        driver.scheduler.check_integrity()
    values[1] -= 1
    driver.run()


@pytest.mark.parametrize("shared", ["request_ids", "slots", "token_ids", "new_blocks"])
def test_the_integrity_check_finds_a_change_in_what_steps_share(shared: str) -> None:
    driver = _driver_between_marks()
    rows = driver.scheduler._decoding._quiet_rows
    assert rows is not None
    getattr(rows, shared)[0] += 1
    with pytest.raises(AssertionError):
        driver.scheduler.check_integrity()


def test_the_integrity_check_finds_that_the_end_of_a_block_would_be_passed_over() -> None:
    driver = _driver_between_marks()
    driver.scheduler._decoding._num_quiet += 1
    with pytest.raises(AssertionError, match="passed over"):
        driver.scheduler.check_integrity()


def _driver_between_marks() -> Driver:
    """One whose next step has nothing to say of any row but its position."""
    driver = Driver(num_blocks=40, depth=1)
    for number in range(2):
        driver.scheduler.add(request(number, [number] * 5, 20))
    while not driver.scheduler._decoding._num_quiet:
        driver.step()
    driver.scheduler.check_integrity()
    return driver


@pytest.mark.parametrize("lost", ["a row", "a prompt", "a stop id"])
def test_the_integrity_check_finds_what_is_lost(lost: str) -> None:
    driver = Driver(num_blocks=40, depth=1, budget=6)
    driver.scheduler.add(request(0, [1, 2], 20, [96]))
    driver.scheduler.add(request(1, list(range(30)), 20))
    for _ in range(3):
        driver.step()
    driver.scheduler.check_integrity()
    match lost:
        case "a row":
            driver.scheduler._decoding.remove(driver.scheduler.running[0])
        case "a prompt":
            driver.scheduler._prefilling.clear()
        case "a stop id":
            driver.scheduler._stop_ids.clear()
    with pytest.raises(AssertionError):
        driver.scheduler.check_integrity()
