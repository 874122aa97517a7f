"""Top-k, top-p, min-p and the draw inside a kernel, for one row of scores, without sorting it.

The bits of a score, made order-preserving, are an integer key. A filter is the search for the lowest key that it keeps:
each pass over the scores weighs three pivots of the interval that holds it. Passes are short because only candidates
are searched: the scores above a bound that the maxima of small groups (top-k) or the distance to the largest score
(top-p, min-p) give for free.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import math

import torch
import triton
import triton.language as tl

from tritonmind.kernels.sampling_state import MIN_TEMPERATURE
from tritonmind.kernels.triton_gumbel import gumbel_at

_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_LOG2_E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_MAX_KEY = tl.constexpr(0x7FFFFFFF)
_MIN_KEY = tl.constexpr(-0x80000000)
_MAX_ID = tl.constexpr(0x7FFFFFFF)
# Vector loads want scores and candidates in multiples of this many. What fills them up is -inf, below any score.
ALIGNMENT = tl.constexpr(16)
# Less than the packed form of any token.
NO_TOKEN = tl.constexpr(-(1 << 63))


@triton.jit
def _key(score):
    """int32 in the order of the scores; no -0.0 and no NaN may come in."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def pack(score, token):
    """int64 whose largest is the best token: the largest score, among equals the lowest id."""
    return (_key(score).to(tl.int64) << 32) | (token ^ _MAX_ID).to(tl.int64)


@triton.jit
def packed_token(best):
    return (best & _MAX_ID) ^ _MAX_ID


@triton.jit
def packed_score(best):
    key = (best >> 32).to(tl.int32)
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def finite(score):
    """Infinities to the largest numbers and NaN to the lowest, so that no difference is NaN; -0.0 to 0.0."""
    score = tl.where(score != score, _LOWEST, score)
    score = tl.minimum(tl.maximum(score, _LOWEST), _LARGEST)
    return tl.where(score == 0.0, 0.0, score)


@triton.jit
def _search(scores_ptr, num_scores, low, high, target, row_max, scale, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest key that a filter keeps: the largest in [low, high] with at least `target` at or above it.

    Scores weigh exp2((score - row_max) * scale) if MASS, else 1. A key between two scores stands for the upper one. If
    even `low` has less than the target, all from `low` on is kept. Every pass drops at least a pivot from the interval,
    and cuts it down to the scores that the interval before held.
    """
    while low < high:
        step = (high.to(tl.int64) - low + 3) // 4
        pivot1 = (low + step).to(tl.int32)
        pivot2 = tl.minimum(low + 2 * step, high).to(tl.int32)
        pivot3 = tl.minimum(low + 3 * step, high).to(tl.int32)
        above1 = tl.zeros((BLOCK,), tl.float32 if MASS else tl.int32)
        above2 = above1
        above3 = above1
        first = tl.full((BLOCK,), _MAX_KEY, tl.int32)
        last = tl.full((BLOCK,), _MIN_KEY, tl.int32)
        for start in range(0, num_scores, BLOCK):
            index = start + tl.arange(0, BLOCK)
            score = tl.load(scores_ptr + index, mask=index < num_scores, other=float("-inf"))
            key = _key(score)
            weight = tl.exp2((score - row_max) * scale) if MASS else 1
            above1 += tl.where(key >= pivot1, weight, 0)
            above2 += tl.where(key >= pivot2, weight, 0)
            above3 += tl.where(key >= pivot3, weight, 0)
            first = tl.minimum(first, tl.where(key >= low, key, _MAX_KEY))
            last = tl.maximum(last, tl.where(key <= high, key, _MIN_KEY))
        total1, total2, total3 = tl.sum(above1, axis=0), tl.sum(above2, axis=0), tl.sum(above3, axis=0)
        reached1, reached2, reached3 = total1 >= target, total2 >= target, total3 >= target
        new_low = tl.where(reached3, pivot3, tl.where(reached2, pivot2, tl.where(reached1, pivot1, low)))
        new_high = tl.where(reached2, tl.where(reached3, high, pivot3 - 1), tl.where(reached1, pivot2 - 1, pivot1 - 1))
        low = tl.maximum(new_low, tl.min(first, axis=0))
        high = tl.minimum(new_high, tl.max(last, axis=0))
        if not MASS:
            # As many scores as wanted: what else the interval holds cannot change the set.
            done = (total1 == target) | (total2 == target) | (total3 == target)
            exact = tl.where(total1 == target, pivot1, tl.where(total2 == target, pivot2, pivot3))
            low = tl.where(done, exact, low)
            high = tl.where(done, exact, high)
    return low


@triton.jit
def _mass(scores_ptr, num_scores, low, row_max, scale, BLOCK: tl.constexpr):
    """The weight that _search gives all scores from the key `low` on."""
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_scores, BLOCK):
        index = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + index, mask=index < num_scores, other=float("-inf"))
        mass += tl.where(_key(score) >= low, tl.exp2((score - row_max) * scale), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _collect(
    scores_ptr, candidates_ptr, candidate_ids_ptr, low,
    VOCAB: tl.constexpr, MAX_CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the scores from the key `low` on, the first MAX_CANDIDATES of them, and count all. -inf ends the copies."""
    num_candidates = 0
    for start in range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + token, mask=token < VOCAB, other=float("-inf"))
        kept = (_key(score) >= low).to(tl.int32)
        place = num_candidates + tl.cumsum(kept, axis=0) - 1
        fits = (kept > 0) & (place < MAX_CANDIDATES)
        tl.store(candidates_ptr + place, score, mask=fits)
        tl.store(candidate_ids_ptr + place, token, mask=fits)
        num_candidates += tl.sum(kept, axis=0)
    end = num_candidates + tl.arange(0, ALIGNMENT)
    tl.store(candidates_ptr + end, float("-inf"), mask=end < MAX_CANDIDATES)
    return num_candidates


@triton.jit
def _candidate_bound(
    group_max_ptr, top_k, top_p, min_p, temperature, row_max,
    VOCAB: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A key at or below the lowest one that the filters keep, found without looking at the row."""
    highest = _key(row_max)
    bound = _key(tl.full((), _LOWEST, tl.float32))
    if (top_k > 0) & (top_k < VOCAB):
        # Each group has a score as large as its maximum: the k-th largest maximum is at most the k-th largest score.
        if top_k <= NUM_GROUPS:
            bound = _search(group_max_ptr, NUM_GROUPS, bound, highest, top_k, 0.0, 0.0, False, BLOCK)
    else:
        # Tokens less likely than (1 - top_p) / VOCAB times the likeliest hold at most 1 - top_p together. A nat more
        # covers the rounding.
        reach = tl.where(top_p < 1.0, tl.log(VOCAB / (1.0 - top_p)), float("inf"))
        reach = tl.minimum(reach, tl.where(min_p > 0.0, -tl.log(min_p), float("inf"))) + 1.0
        bound = tl.maximum(bound, _key(finite(row_max - temperature * reach)))
    return tl.minimum(bound, highest)


@triton.jit
def _draw(
    scores_ptr, ids_ptr, num_scores, num_ids, low, min_p, row_max, temperature, scale, seed, position,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The packed best of the scores from the key `low` on that min-p leaves. If num_ids is 0, places are ids."""
    # The largest score always stays.
    low = tl.minimum(low, _key(row_max))
    min_p = tl.minimum(min_p, 1.0)
    best = tl.full((BLOCK,), NO_TOKEN, tl.int64)
    for start in range(0, num_scores, BLOCK):
        index = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + index, mask=index < num_scores, other=float("-inf"))
        kept = (_key(score) >= low) & (tl.exp2((score - row_max) * scale) >= min_p)
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            token = tl.load(ids_ptr + index, mask=index < num_ids, other=0)
            token = tl.where(num_ids > 0, token, index)
            noisy = tl.div_rn(score, temperature) + gumbel_at(seed, position, token)
            best = tl.maximum(best, tl.where(kept, pack(noisy, token), NO_TOKEN))
    return tl.max(best, axis=0)


@triton.jit
def filter_and_draw(
    scores_ptr, group_max_ptr, candidate_ids_ptr, row_max, temperature, top_k, top_p, min_p, seed, position,
    VOCAB: tl.constexpr, PADDED_VOCAB: tl.constexpr, NUM_GROUPS: tl.constexpr, MAX_CANDIDATES: tl.constexpr,
    SEARCH_BLOCK: tl.constexpr, DRAW_BLOCK: tl.constexpr,
):  # fmt: skip
    """The packed best token of a row. Its scores are followed, from PADDED_VOCAB on, by room for the candidates."""
    temperature = tl.maximum(temperature, _MIN_TEMPERATURE)
    scale = _LOG2_E / temperature
    low = _candidate_bound(
        group_max_ptr, top_k, top_p, min_p, temperature, row_max, VOCAB, NUM_GROUPS, SEARCH_BLOCK
    )  # fmt: skip
    has_top_k = (top_k > 0) & (top_k < VOCAB)
    mass = 0.0
    if (top_p < 1.0) & ((top_k <= 0) | (top_k >= VOCAB)):
        mass = _mass(scores_ptr, VOCAB, _MIN_KEY, row_max, scale, SEARCH_BLOCK)
    num_candidates = _collect(
        scores_ptr, scores_ptr + PADDED_VOCAB, candidate_ids_ptr, low, VOCAB, MAX_CANDIDATES, SEARCH_BLOCK
    )  # fmt: skip
    # Other threads of this program read what these stored.
    tl.debug_barrier()
    is_copied = num_candidates <= MAX_CANDIDATES
    num_scores = tl.where(is_copied, tl.cdiv(num_candidates, ALIGNMENT) * ALIGNMENT, PADDED_VOCAB)
    num_scores = tl.multiple_of(num_scores, ALIGNMENT)
    scores_ptr += tl.multiple_of(tl.where(is_copied, PADDED_VOCAB, 0), ALIGNMENT)

    highest = _key(row_max)
    if has_top_k:
        low = _search(scores_ptr, num_scores, low, highest, top_k, 0.0, 0.0, False, SEARCH_BLOCK)
        if top_p < 1.0:
            mass = _mass(scores_ptr, num_scores, low, row_max, scale, SEARCH_BLOCK)
    if top_p < 1.0:
        low = _search(scores_ptr, num_scores, low, highest, top_p * mass, row_max, scale, True, SEARCH_BLOCK)
    num_ids = tl.where(is_copied, num_scores, 0)
    return _draw(
        scores_ptr, candidate_ids_ptr, num_scores, num_ids, low, min_p, row_max, temperature, scale, seed, position,
        DRAW_BLOCK,
    )  # fmt: skip
