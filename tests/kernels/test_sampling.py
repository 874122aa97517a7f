"""Sampling: each implementation against the naive reference and against exact distributions."""

from typing import Any

import pytest
import torch

from tests.kernels.kernel_cases import Target
from tests.sampling_values import NEUTRAL
from tritonmind.kernels import PROMPT_FLAG, SamplingState, gumbel_noise, reference, sample_tokens

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_k above the groups": {"top_k": 60, "temperature": 3.0},
    "top_p": {"top_p": 0.9},
    "top_p of a flat row": {"top_p": 0.95, "temperature": 30.0},
    "min_p": {"min_p": 0.05},
    "top_k, top_p": {"top_k": 20, "top_p": 0.8, "temperature": 1.5},
    "top_k, min_p": {"top_k": 20, "min_p": 0.02, "temperature": 1.5},
    "top_p, min_p": {"top_p": 0.97, "min_p": 0.03, "temperature": 1.5},
    "all filters": {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 2.0},
    "repetition": {"repetition_penalty": 1.5, "temperature": 2.0},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.8, "frequency_penalty": -0.4},
    "everything": {
        "temperature": 1.2, "top_k": 40, "top_p": 0.95, "min_p": 0.01,
        "repetition_penalty": 0.8, "presence_penalty": -0.6, "frequency_penalty": 0.3,
    },
}  # fmt: skip
VOCAB_SIZE = 203
# 99.9 % of a chi-square distribution, by degrees of freedom.
CHI_SQUARE_999 = {2: 13.82, 4: 18.47, 5: 20.52, 9: 27.88}
NUM_DRAWS = 20_000


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter: several blocks, groups and tiles a row, and rows with more candidates than are copied."""
    if "target" not in request.fixturenames:
        return
    target: Target = request.getfixturevalue("target")
    if target.triton and target.device == "cpu":
        from tritonmind.kernels import triton_sampling

        sizes = {"SCORE_BLOCK": 64, "GROUP": 8, "SEARCH_BLOCK": 128, "DRAW_BLOCK": 32, "MAX_CANDIDATES": 48}
        for name, size in sizes.items():
            monkeypatch.setattr(triton_sampling, name, size)


def make_state(num_slots: int, vocab_size: int, rows: list[dict[str, Any]] | None = None) -> SamplingState:
    """Slot n samples as rows[n] says, neutrally without; random seeds, some tokens prompted, some generated."""
    rows = rows or [{}] * num_slots
    values = {name: torch.tensor([row.get(name, neutral) for row in rows]) for name, neutral in NEUTRAL.items()}
    values["top_k"] = values["top_k"].int()
    counts = (torch.rand(num_slots, vocab_size) < 0.3) * torch.randint(1, 4, (num_slots, vocab_size))
    counts += (torch.rand(num_slots, vocab_size) < 0.3) * PROMPT_FLAG
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_slots,))
    return SamplingState(**values, seed=seeds, token_counts=counts.int())


def on(device: str, state: SamplingState) -> SamplingState:
    """A copy of the state on this device."""
    return SamplingState(*(tensor.clone().to(device) for tensor in state))


def draw(
    logits: torch.Tensor,
    state: SamplingState,
    *,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> list[int]:
    """Draw with a state of the CPU, by default row n from slot n at position n; the state stays as it is."""
    ids = torch.arange(len(logits), dtype=torch.int32)
    slots = ids if slots is None else slots
    positions = ids if positions is None else positions
    device = logits.device.type
    return sample_tokens(logits, slots.to(device), positions.to(device), on(device, state)).tolist()


def check(logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Tokens, counts and last tokens equal the reference's. Returns the tokens."""
    device = logits.device.type
    expected_state, actual_state = on("cpu", state), on(device, state)
    expected_last = torch.full((len(state.seed),), -7)
    actual_last = expected_last.to(device)
    expected = reference.sample_tokens(logits.cpu(), slots, positions, expected_state, last_token_ids=expected_last)
    out = torch.full((len(logits),), -9, device=device)
    actual = sample_tokens(
        logits, slots.to(device), positions.to(device), actual_state, last_token_ids=actual_last, out=out
    )
    assert actual is out
    assert actual.tolist() == expected.tolist()
    assert torch.equal(actual_last.cpu(), expected_last)
    for name, before in expected_state._asdict().items():
        assert torch.equal(getattr(actual_state, name).cpu(), before), name
    return expected


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, target: Target) -> None:
    num_rows = 3
    state = make_state(num_rows, VOCAB_SIZE, [OPTIONS[name]] * num_rows)
    rows = torch.arange(num_rows, dtype=torch.int32)
    check(3 * target.randn(num_rows, VOCAB_SIZE), rows, torch.randint(0, 2**20, (num_rows,)).int(), state)


def test_mixed_batch_with_padding(target: Target) -> None:
    """Every kind of row in one batch, slots in any order; free slots and padding rows are left alone."""
    rows = [*OPTIONS.values(), {}, {"temperature": 0.0}]
    slots = torch.randperm(len(rows)).int()
    slots[[2, 9]] = -1
    state = make_state(len(rows), VOCAB_SIZE, rows)
    tokens = check(2 * target.randn(len(rows), VOCAB_SIZE), slots, torch.arange(len(rows)).int() + 5, state)
    assert tokens[[2, 9]].tolist() == [0, 0]


def test_a_row_does_not_depend_on_the_batch(target: Target) -> None:
    rows = list(OPTIONS.values())[::3]
    state = make_state(len(rows), VOCAB_SIZE, rows)
    logits, ids = 2 * target.randn(len(rows), VOCAB_SIZE), torch.arange(len(rows), dtype=torch.int32)
    together = draw(logits, state)
    for row in (0, 3, 5):
        one = ids[row : row + 1]
        assert draw(logits[row : row + 1].clone(), state, slots=one, positions=one) == [together[row]]
    order = torch.randperm(len(rows))
    shuffled = draw(logits[order.to(logits.device)], state, slots=ids[order], positions=ids[order])
    assert shuffled == [together[row] for row in order]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 10),
        ({"temperature": 0.5}, 10),
        ({"temperature": 1.7}, 10),
        ({"top_k": 3}, 3),
        ({"top_p": 0.88}, 6),
        ({"min_p": 0.22}, 6),
        ({"top_k": 5, "top_p": 0.95, "temperature": 1.3}, 5),
        ({"top_k": 7, "top_p": 0.97, "min_p": 0.21, "temperature": 0.9}, 5),
    ],
)
def test_draws_follow_the_exact_distribution(options: dict[str, Any], kept: int, device: str) -> None:
    torch.manual_seed(0)  # a 0.1 % tail would fail one run in two hundred
    ordered = torch.tensor([0.30, 0.20, 0.15, 0.10, 0.08, 0.07, 0.04, 0.03, 0.02, 0.01])
    order = torch.randperm(10)
    probabilities = ordered ** (1 / options.get("temperature", 1.0))
    probabilities[kept:] = 0
    probabilities /= probabilities.sum()
    state = make_state(NUM_DRAWS, 10, [options] * NUM_DRAWS)
    tokens = torch.tensor(draw(ordered.log()[order].to(device).expand(NUM_DRAWS, -1).contiguous(), state))
    counts = torch.bincount(order[tokens], minlength=10)
    assert counts[kept:].sum() == 0
    expected = probabilities[:kept] * NUM_DRAWS
    assert ((counts[:kept] - expected) ** 2 / expected).sum() < CHI_SQUARE_999[kept - 1]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {1, 2, 3}),
        ({"top_k": 4}, {1, 2, 3, 6}),
        ({"top_p": 0.35}, {1, 2, 3}),
        ({"top_p": 0.05}, {1}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 5, "top_p": 0.5}, {1, 2, 3}),
    ],
)
def test_equal_scores_stay_together(options: dict[str, Any], kept: set[int], target: Target) -> None:
    """At temperature 10 what stays is nearly equally likely: these 16 draws miss none of it."""
    torch.manual_seed(0)
    num_rows = 16
    state = make_state(num_rows, 7, [{"temperature": 10.0, **options}] * num_rows)
    logits = torch.tensor([0.0, 3.0, 2.0, 2.0, -1.0, 0.0, 1.0]).to(target.device, target.dtype)
    assert set(draw(logits.expand(num_rows, -1).contiguous(), state)) == kept


def test_filters_that_keep_one_or_all(target: Target) -> None:
    logits = 2 * target.randn(4, VOCAB_SIZE)
    logits[torch.arange(4), torch.tensor([5, 0, VOCAB_SIZE - 1, 77])] = 9.0
    unfiltered = make_state(4, VOCAB_SIZE, [{"temperature": 5.0}] * 4)
    for one in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        rows = [{"temperature": 5.0, **one}] * 4
        state = unfiltered._replace(**{k: getattr(make_state(4, VOCAB_SIZE, rows), k) for k in one})
        assert draw(logits, state) == [5, 0, VOCAB_SIZE - 1, 77], one
    for top_k in (VOCAB_SIZE, VOCAB_SIZE + 1, 2**31 - 1):
        state = unfiltered._replace(top_k=torch.full((4,), top_k, dtype=torch.int32))
        assert draw(logits, state) == draw(logits, unfiltered)


def test_flat_rows(target: Target) -> None:
    """Equal scores, 0 and -0 among them, all stay whatever the filter; nearly equal ones go one by one."""
    rows = [{"top_p": 0.999}, {"top_p": 0.3}, {"top_k": 3}, {"top_p": 0.999}, {"top_p": 0.5}]
    state = make_state(5, VOCAB_SIZE, rows)
    logits = torch.zeros(5, VOCAB_SIZE)
    logits[:, ::3] = -0.0
    logits[3:] = 0.01 * torch.randn(2, VOCAB_SIZE)
    logits = logits.to(target.device, target.dtype)
    ids = torch.arange(5, dtype=torch.int32)
    tokens = check(logits, ids, ids, state)
    noise = gumbel_noise(state.seed[:3], ids[:3].long(), VOCAB_SIZE)
    assert tokens[:3].tolist() == noise.argmax(1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-39])
def test_a_tiny_temperature_is_greedy(temperature: float, target: Target) -> None:
    logits = target.randn(2, VOCAB_SIZE)
    logits[:, 150] = 9.0
    rows = [{"temperature": temperature}, {"temperature": temperature, "top_k": 50, "top_p": 0.9, "min_p": 0.1}]
    assert draw(logits, make_state(2, VOCAB_SIZE, rows)) == [150, 150]


@pytest.mark.parametrize(
    ("penalty", "count", "cost"),
    [
        ({"repetition_penalty": 2.0}, PROMPT_FLAG, 2.0),
        ({"repetition_penalty": 2.0}, 3, 2.0),
        ({"presence_penalty": 1.0}, PROMPT_FLAG, 0.0),
        ({"presence_penalty": 1.0}, PROMPT_FLAG | 3, 1.0),
        ({"frequency_penalty": 0.5}, 3, 1.5),
        ({"frequency_penalty": 0.5}, PROMPT_FLAG, 0.0),
        ({"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5}, PROMPT_FLAG | 2, 3.25),
    ],
)
def test_penalties_by_hand(penalty: dict[str, float], count: int, cost: float, target: Target) -> None:
    """Token 3 with a logit of 4 loses `cost`: it wins over a rival just below, and loses to one just above."""
    state = make_state(2, 9, [{"temperature": 0.0, **penalty}] * 2)
    state.token_counts.zero_()[:, 3] = count
    logits = torch.full((2, 9), -5.0)
    logits[:, 3] = 4.0
    logits[:, 6] = torch.tensor([4 - cost - 0.125, 4 - cost + 0.125])
    assert draw(logits.to(target.device, target.dtype), state) == [3, 6]


def test_repetition_multiplies_a_negative_logit(target: Target) -> None:
    state = make_state(1, 2, [{"temperature": 0.0, "repetition_penalty": 1.5}])
    state.token_counts[0] = torch.tensor([PROMPT_FLAG, 0])
    assert draw(torch.tensor([[-2.0, -2.5]]).to(target.device, target.dtype), state) == [1]


def test_a_token_is_counted_once_and_only_for_a_penalty(target: Target) -> None:
    rows = [{"presence_penalty": 0.1}, {}, {"repetition_penalty": 1.1, "temperature": 0.0}, {"frequency_penalty": 0.1}]
    before = make_state(4, VOCAB_SIZE, rows)
    after = on(target.device, before)
    slots = torch.tensor([3, 1, 2], dtype=torch.int32, device=target.device)
    tokens = sample_tokens(target.randn(3, VOCAB_SIZE), slots, slots, after).tolist()
    expected = before.token_counts.clone()
    expected[3, tokens[0]] += 1
    expected[2, tokens[2]] += 1
    assert torch.equal(after.token_counts.cpu(), expected)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1},
                                     {"top_k": 60, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}])  # fmt: skip
def test_extreme_logits(options: dict[str, Any], target: Target) -> None:
    """Infinities and NaN: an id in range, never a masked one beside others, the reference's choice."""
    nan, inf = float("nan"), float("inf")
    logits = target.randn(8, VOCAB_SIZE)
    logits[0], logits[1], logits[2], logits[3] = nan, -inf, inf, 65504
    logits[4, ::2] = -inf
    logits[5, 1::2] = nan
    logits[6, 7], logits[6, 9] = 65504, -65504
    logits[7], logits[7, 50] = -65504, inf
    ids = torch.arange(8, dtype=torch.int32)
    tokens = check(logits, ids, ids, make_state(8, VOCAB_SIZE, [{"temperature": 0.7, **options}] * 8))
    assert tokens.min() >= 0 and tokens.max() < VOCAB_SIZE
    assert tokens[4] % 2 == 1 and tokens[5] % 2 == 0 and tokens[6] == 7 and tokens[7] == 50


def test_greedy_reads_no_parameter(target: Target) -> None:
    """The largest logit, the lowest id among equals; NaN never wins. Parameters here would spoil any draw."""
    nan = float("nan")
    spoilt = {"temperature": nan, "top_k": -5, "top_p": nan, "min_p": nan, "repetition_penalty": nan}
    state = on(target.device, make_state(5, VOCAB_SIZE, [spoilt] * 5))
    counts = state.token_counts.clone()
    logits = target.randn(4, VOCAB_SIZE)
    logits[0, [30, 20, 150]] = 9.0
    logits[1, 0], logits[1, 99] = nan, 9.0
    logits[3, VOCAB_SIZE - 1] = 9.0
    slots = torch.tensor([4, 0, -1, 2], dtype=torch.int32, device=target.device)
    last = torch.full((5,), -7, device=target.device)
    tokens = sample_tokens(logits, slots, slots, state, greedy=True, last_token_ids=last)
    assert tokens.tolist() == [20, 99, 0, VOCAB_SIZE - 1]
    assert last.tolist() == [99, -7, VOCAB_SIZE - 1, -7, 20]
    assert torch.equal(state.token_counts, counts)


def test_seed_and_position_both_change_the_draw(target: Target) -> None:
    logits = torch.zeros(4, 1000, device=target.device, dtype=target.dtype)
    state = make_state(4, 1000)._replace(seed=torch.tensor([1, 2, 1, 1 + 2**32]))
    tokens = draw(logits, state, positions=torch.tensor([1, 1, 2, 1], dtype=torch.int32))
    assert len(set(tokens)) == 4


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 128256), (64, 32000), (7, 49152), (16, 32003)])
def test_large(num_rows: int, vocab_size: int, gpu_target: Target) -> None:
    """Against the CPU twin, which the tests above hold to the reference; peaked rows and flat ones."""
    kinds = [*OPTIONS.values(), {}, {"top_k": 1000, "top_p": 0.99}, {"top_k": 5000}, {"top_p": 0.999}]
    order = torch.randperm(len(kinds)).tolist()
    ids = torch.arange(num_rows, dtype=torch.int32)
    for scale in (4.0, 0.02):
        rows = [kinds[order[row % len(kinds)]] for row in range(num_rows)]
        state = make_state(num_rows, vocab_size, rows)
        logits = scale * gpu_target.randn(num_rows, vocab_size)
        on_gpu = on("cuda", state)
        tokens = sample_tokens(logits, ids.cuda(), ids.cuda(), on_gpu)
        assert tokens.tolist() == sample_tokens(logits.cpu(), ids, ids, state).tolist()
        assert torch.equal(on_gpu.token_counts.cpu(), state.token_counts)
        greedy = sample_tokens(logits, ids.cuda(), ids.cuda(), on_gpu, greedy=True)
        assert greedy.tolist() == sample_tokens(logits.cpu(), ids, ids, state, greedy=True).tolist()


@pytest.mark.gpu
def test_a_graph_follows_its_inputs_without_synchronising() -> None:
    num_rows, vocab_size = 6, 32000
    states = [make_state(num_rows, vocab_size, rows) for rows in ([{}] * 6, list(OPTIONS.values())[-6:])]
    logits = torch.randn(num_rows, vocab_size, device="cuda", dtype=torch.float16)
    slots = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    state = on("cuda", states[0])
    sample_tokens(logits, slots, slots, on("cuda", states[0]))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample_tokens(logits, slots, slots, state)
    for source in states:
        logits.copy_(3 * torch.randn(num_rows, vocab_size))
        for tensor, value in zip(state, source, strict=True):
            tensor.copy_(value)
        expected = sample_tokens(logits, slots, slots, on("cuda", source)).tolist()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
            sample_tokens(logits, slots, slots, state, greedy=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert out.tolist() == expected


def test_arguments_are_checked() -> None:
    logits, ids, state = torch.randn(2, 8), torch.zeros(2, dtype=torch.int32), make_state(3, 8)
    with pytest.raises(ValueError, match=r"logits with strides .* is not contiguous"):
        sample_tokens(torch.randn(8, 2).t(), ids, ids, state)
    with pytest.raises(ValueError, match="at least one token"):
        sample_tokens(torch.randn(2, 0), ids, ids, state)
    with pytest.raises(ValueError, match="slots has dtype"):
        sample_tokens(logits, ids.long(), ids, state)
    with pytest.raises(ValueError, match="positions has shape"):
        sample_tokens(logits, ids, ids[:1], state)
    with pytest.raises(ValueError, match="top_k has dtype"):
        sample_tokens(logits, ids, ids, state._replace(top_k=state.top_k.long()))
    with pytest.raises(ValueError, match="token_counts has shape"):
        sample_tokens(logits, ids, ids, make_state(3, 9))
    with pytest.raises(ValueError, match="min_p has shape"):
        sample_tokens(logits, ids, ids, state._replace(min_p=state.min_p[:2]))
    with pytest.raises(ValueError, match="last_token_ids has shape"):
        sample_tokens(logits, ids, ids, state, last_token_ids=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="out has dtype"):
        sample_tokens(logits, ids, ids, state, out=torch.zeros(2, dtype=torch.int32))
