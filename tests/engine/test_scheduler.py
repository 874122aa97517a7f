"""The scheduler over an arithmetic model: whatever it does, every answer must be that of the request alone."""

from __future__ import annotations

import random
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.driver import BLOCK, Driver, request
from tests.engine.fakes import generate
from tritonmind.engine import hold_back
from tritonmind.messages import EngineRequest
from tritonmind.sequence import SequenceStatus


@pytest.mark.parametrize("depth", [0, 1])
def test_one_request_gets_exactly_its_tokens(depth: int) -> None:
    driver = Driver(num_blocks=10, depth=depth)
    driver.scheduler.add(request(0, [1, 2, 3], 9))
    driver.run()
    assert driver.tokens[0] == generate([1, 2, 3], 9)
    assert driver.finals[0].finish_reason == "length"


@pytest.mark.parametrize("depth", [0, 1])
def test_a_stop_token_ends_the_answer_and_is_its_last_token(depth: int) -> None:
    expected = generate([1, 2, 3], 9)
    stop = expected[4]
    driver = Driver(num_blocks=10, depth=depth)
    driver.scheduler.add(request(0, [1, 2, 3], 9, [stop]))
    driver.run()
    assert driver.tokens[0] == expected[: expected.index(stop) + 1]
    assert driver.finals[0].finish_reason == "stop" and driver.finals[0].stop_token_id == stop


@pytest.mark.parametrize("depth", [0, 1])
def test_the_context_limit_ends_the_answer(depth: int) -> None:
    driver = Driver(num_blocks=10, depth=depth)
    driver.scheduler.add(request(0, list(range(38)), 9))
    driver.run()
    assert driver.tokens[0] == generate(list(range(38)), 2)
    assert driver.finals[0].finish_reason == "length"


def test_decodes_go_on_while_a_long_prompt_is_chunked() -> None:
    driver = Driver(num_blocks=20, depth=0, budget=6)
    driver.scheduler.add(request(0, [1], 12))
    driver.step()
    driver.scheduler.add(request(1, list(range(30)), 2))
    before = len(driver.tokens[0])
    for number in range(1, 6):
        driver.step()
        assert len(driver.tokens[0]) == before + number, "the decode skipped a step"
    assert driver.executor.max_tokens_in_a_step <= 6
    driver.run()
    assert driver.tokens[1] == generate(list(range(30)), 2)


def test_first_come_first_served_and_slots_limit_the_batch() -> None:
    driver = Driver(num_blocks=40, depth=0, max_num_seqs=2)
    for number in range(5):
        driver.scheduler.add(request(number, [number], 3))
    driver.step()
    assert [seq.request_id for seq in driver.scheduler.running] == [0, 1]
    driver.run()
    assert list(driver.finals) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("caching", [True, False])
def test_preempted_sequences_recompute_and_lose_nothing(depth: int, caching: bool) -> None:
    driver = Driver(num_blocks=10, depth=depth, caching=caching)
    prompts = [[n, n + 1, n + 2, n + 3, n + 4] for n in range(4)]
    for number, prompt in enumerate(prompts):
        driver.scheduler.add(request(number, prompt, 20))
    driver.run()
    assert driver.scheduler.num_preemptions > 0, "the test is about preemption"
    for number, prompt in enumerate(prompts):
        assert driver.tokens[number] == generate(prompt, 20)
        assert driver.finals[number].num_cached_tokens == 0, "its own recomputed tokens are no cache hit"


def test_the_earliest_sequence_is_never_preempted() -> None:
    driver = Driver(num_blocks=10, depth=0)
    for number in range(4):
        driver.scheduler.add(request(number, [number] * 5, 20))
    first = driver.scheduler.waiting[0]
    while first.request_id not in driver.finals:
        driver.step()
        assert first not in driver.scheduler.waiting
    assert driver.scheduler.num_preemptions > 0
    driver.run()


def test_waiting_requests_run_by_priority_then_arrival() -> None:
    driver = Driver(num_blocks=40, depth=0, max_num_seqs=1)
    priorities = [5, 5, 1, 9, 1, 5]
    for number, priority in enumerate(priorities):
        driver.scheduler.add(request(number, [number], 3, priority=priority))
    driver.run()
    assert list(driver.finals) == [2, 4, 0, 1, 5, 3]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_late_urgent_request_is_never_preempted_for_the_others(depth: int) -> None:
    driver = Driver(num_blocks=10, depth=depth)
    for number in range(3):
        driver.scheduler.add(request(number, [number] * 5, 20, priority=7))
    driver.step()
    driver.scheduler.add(request(3, [3] * 5, 20, priority=2))
    urgent = driver.scheduler.waiting[0]
    assert urgent.request_id == 3, "it did not pass those that wait"
    while urgent.request_id not in driver.finals:
        driver.step()
        assert urgent.status is not SequenceStatus.WAITING
    assert driver.scheduler.num_preemptions > 0, "the test is about preemption"
    driver.run()
    for number in range(4):
        assert driver.tokens[number] == generate([number] * 5, 20)


def test_the_time_in_the_queue_ends_with_the_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("tritonmind.engine.scheduler.time.monotonic", lambda: clock[0])
    driver = Driver(num_blocks=40, depth=0, max_num_seqs=1)
    driver.scheduler.add(request(0, [1], 3))
    driver.scheduler.add(request(1, [2], 3))
    while not driver.scheduler.running or driver.scheduler.running[0].request_id == 0:
        driver.step()
        clock[0] += 0.5
    driver.run()
    assert driver.queue_times == {0: 0.0, 1: 1.5}


@pytest.mark.parametrize("depth", [0, 1])
def test_cached_tokens_are_counted(depth: int) -> None:
    driver = Driver(num_blocks=20, depth=depth)
    driver.scheduler.add(request(0, list(range(10)), 3))
    driver.run()
    driver.scheduler.add(request(1, list(range(10)), 3))
    driver.run()
    assert driver.finals[0].num_cached_tokens == 0
    assert driver.finals[1].num_cached_tokens == 8
    assert driver.tokens[1] == driver.tokens[0] == generate(list(range(10)), 3)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_next_turn_finds_what_was_generated(depth: int) -> None:
    """All but the last token, which was never computed, as far as it fills blocks."""
    driver = Driver(num_blocks=20, depth=depth)
    driver.scheduler.add(request(0, list(range(6)), 15))
    driver.run()
    turn = [*range(6), *driver.tokens[0]]
    driver.scheduler.add(request(1, [*turn, 1, 2], 3))
    driver.run()
    assert driver.finals[1].num_cached_tokens == (len(turn) - 1) // BLOCK * BLOCK == 20
    assert driver.tokens[1] == generate([*turn, 1, 2], 3)


@pytest.mark.parametrize("depth", [0, 1])
def test_abort_of_waiting_running_and_unknown_requests(depth: int) -> None:
    driver = Driver(num_blocks=20, depth=depth, max_num_seqs=1)
    driver.scheduler.add(request(0, [1, 2], 10))
    driver.scheduler.add(request(1, [3], 10))
    for _ in range(3):
        driver.step()
    driver.take(driver.scheduler.abort([0, 1, 99]))
    assert {final.finish_reason for final in driver.finals.values()} == {"cancelled"}
    assert driver.scheduler.abort([0]) == []
    driver.scheduler.add(request(2, [5, 6], 4))
    driver.run()
    assert driver.tokens[2] == generate([5, 6], 4)
    assert len(driver.tokens[0]) < 10


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    depth=st.integers(0, 1),
    num_blocks=st.integers(10, 24),
    budget=st.integers(4, 16),
    caching=st.booleans(),
    with_inputs=st.booleans(),
    rope_limits=st.sampled_from([(), (9,), (12, 24)]),
    holds_back=st.booleans(),
)
@patch.multiple(hold_back, MANY_DECODES=2, MIN_SHARED_TOKENS=12)
def test_random_traffic(
    seed: int, depth: int, num_blocks: int, budget: int, caching: bool, with_inputs: bool, rope_limits: tuple[int, ...],
    holds_back: bool,
) -> None:  # fmt: skip
    """with_inputs: through the tensors of the steps, those of decodes as a graph would read them.

    rope_limits: lengths beyond which a sequence is computed again, in none of whose blocks others of another length may
    share.
    """
    draw = random.Random(seed)
    driver = Driver(
        num_blocks=num_blocks,
        depth=depth,
        max_num_seqs=6,
        budget=max(6, budget),
        caching=caching,
        with_inputs=with_inputs,
        rope_limits=rope_limits,
        holds_back=holds_back,
    )
    requests: dict[int, EngineRequest] = {}
    aborted = set()
    for number in range(25):
        for _ in range(draw.randrange(6)):
            driver.step()
        # Few distinct tokens, so that prefixes are often shared.
        prompt = [draw.randrange(2)] * draw.randrange(1, 25) + [draw.randrange(3) for _ in range(draw.randrange(5))]
        stop = [draw.randrange(97) for _ in range(draw.randrange(8))]
        first = request(3 * number, prompt, draw.randrange(1, 15), stop, priority=draw.randrange(3))
        for other in range(draw.choice([1, 1, 1, 3])):
            parent_id = first.request_id if other else None
            added = msgspec.structs.replace(first, request_id=first.request_id + other, parent_id=parent_id)
            requests[added.request_id] = added
            driver.scheduler.add(added)
        if draw.random() < 0.3:
            victim = draw.choice(list(requests))
            if victim not in driver.finals:
                aborted.add(victim)
            driver.take(driver.scheduler.abort([victim]))
            driver.scheduler.check_integrity()
        if draw.random() < 0.05:
            driver.manager.reset_prefix_cache()
    driver.run()
    assert driver.finals.keys() == requests.keys()
    for number, req in requests.items():
        room = min(req.max_tokens, 40 - len(req.prompt_token_ids))
        expected = generate(req.prompt_token_ids, room)
        stops = [i for i, token in enumerate(expected) if token in req.stop_token_ids]
        if stops:
            expected = expected[: stops[0] + 1]
        if number in aborted:
            assert driver.tokens[number] == expected[: len(driver.tokens[number])]
        else:
            assert driver.tokens[number] == expected


@pytest.mark.parametrize("depth", [0, 1])
def test_answers_to_one_prompt_share_its_blocks(depth: int) -> None:
    """The prompt is computed once: what the others compute of it is only what no full block before its end holds."""
    prompt = list(range(30))
    driver = Driver(num_blocks=40, depth=depth)
    driver.scheduler.add(request(0, prompt, 6))
    for number in (1, 2):
        driver.scheduler.add(msgspec.structs.replace(request(number, prompt, 6), parent_id=0))
    driver.step()
    assert len(driver.scheduler.running) == 1, "the others wait while the prompt is being computed"
    driver.scheduler.add(request(3, [7, 7], 6))
    driver.run()
    for number in (0, 1, 2):
        assert driver.tokens[number] == generate(prompt, 6)
        assert driver.finals[number].num_cached_tokens == (0 if number == 0 else (len(prompt) - 1) // BLOCK * BLOCK)
    assert driver.tokens[3] == generate([7, 7], 6)


@pytest.mark.parametrize("end", ["abort", "no caching"])
def test_an_answer_does_not_wait_for_a_prompt_that_nobody_computes(end: str) -> None:
    prompt = list(range(30))
    driver = Driver(num_blocks=40, depth=1, caching=end != "no caching")
    driver.scheduler.add(request(0, prompt, 6))
    driver.scheduler.add(msgspec.structs.replace(request(1, prompt, 6), parent_id=0))
    driver.step()
    if end == "abort":
        driver.take(driver.scheduler.abort([0]))
    driver.run()
    assert driver.tokens[1] == generate(prompt, 6)


def test_answers_that_wait_for_a_prompt_keep_their_places() -> None:
    """Requests that came later, and are less urgent, do not take the slots of those that wait for their prompt."""
    prompt = list(range(30))
    driver = Driver(num_blocks=80, depth=0, max_num_seqs=4, budget=8)
    driver.scheduler.add(request(0, prompt, 6))
    for number in (1, 2, 3):
        driver.scheduler.add(msgspec.structs.replace(request(number, prompt, 6), parent_id=0))
    for number in (4, 5, 6):
        driver.scheduler.add(request(number, [number] * 20, 6))
    started: list[int] = []
    for _ in range(12):
        driver.step()
        started += [seq.request_id for seq in driver.scheduler.running if seq.request_id not in started]
    assert started[:4] == [0, 1, 2, 3]
    driver.run()
    assert all(driver.tokens[number] == generate(prompt, 6) for number in range(4))
