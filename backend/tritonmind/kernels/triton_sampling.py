"""The kernels behind sampling.py: scores and noise by blocks of the vocabulary, then one program a row chooses.

The best token of a block, and of a row, is the largest int64 of key << 32 | MAX_ID - id: equals go to the lowest id.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import torch
import triton
import triton.language as tl

from tritonmind.kernels.pdl import let_next_start, use_pdl, wait
from tritonmind.kernels.sampling_state import MIN_TEMPERATURE, PROMPT_FLAG, SamplingState
from tritonmind.kernels.triton_filters import (
    ALIGNMENT,
    NO_TOKEN,
    filter_and_draw,
    finite,
    pack,
    packed_score,
    packed_token,
)
from tritonmind.kernels.triton_gumbel import gumbel_block

SCORE_BLOCK = 2048
# Scores of a tile of a search, and of the final draw, whose random numbers need more registers.
SEARCH_BLOCK = 4096
DRAW_BLOCK = 1024
# Scores whose maximum bounds the top-k search; a top_k above the number of groups searches the whole row.
GROUP = 32
# Candidates that are copied out of a row; when more pass the bound, the whole row is searched instead.
MAX_CANDIDATES = 4096

_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_GENERATED = tl.constexpr(PROMPT_FLAG - 1)


@triton.jit
def _has_penalty(repetition_penalty, presence_penalty, frequency_penalty):
    return (repetition_penalty != 1.0) | (presence_penalty != 0.0) | (frequency_penalty != 0.0)


@triton.jit
def _has_filter(temperature, top_k, top_p, min_p, VOCAB: tl.constexpr):
    return (temperature > 0.0) & (((top_k > 0) & (top_k < VOCAB)) | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def _penalise(score, counts, repetition_penalty, presence_penalty, frequency_penalty):
    generated = counts & _GENERATED
    repeated = tl.where(score > 0.0, tl.div_rn(score, repetition_penalty), score * repetition_penalty)
    score = tl.where(counts != 0, repeated, score)
    score -= frequency_penalty * generated.to(tl.float32)
    return score - tl.where(generated > 0, presence_penalty, 0.0)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def _score_kernel(
    logits_ptr,  # [R, VOCAB]
    slots_ptr,  # [R]
    positions_ptr,  # [R]
    temperature_ptr,  # [S], as all of the state that follows
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    repetition_penalty_ptr,
    presence_penalty_ptr,
    frequency_penalty_ptr,
    seed_ptr,
    token_counts_ptr,  # [S, VOCAB]
    block_best_ptr,  # [R, NUM_BLOCKS] int64, packed; the largest score of a row with a filter, the draw of others
    scores_ptr,  # [R, PADDED_VOCAB + MAX_CANDIDATES] fp32, written for a row with a filter
    group_max_ptr,  # [R, NUM_BLOCKS * BLOCK // GROUP] fp32, written for a row with a filter
    VOCAB: tl.constexpr,
    PADDED_VOCAB: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    GREEDY: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    score = tl.load(logits_ptr + row * VOCAB + token, mask=inside, other=float("-inf")).to(tl.float32)
    if GREEDY:
        score = finite(score)
    else:
        repetition_penalty = tl.load(repetition_penalty_ptr + slot)
        presence_penalty = tl.load(presence_penalty_ptr + slot)
        frequency_penalty = tl.load(frequency_penalty_ptr + slot)
        if _has_penalty(repetition_penalty, presence_penalty, frequency_penalty):
            counts = tl.load(token_counts_ptr + slot * VOCAB + token, mask=inside, other=0)
            score = _penalise(score, counts, repetition_penalty, presence_penalty, frequency_penalty)
        score = finite(score)
        temperature = tl.load(temperature_ptr + slot)
        top_k, top_p, min_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)
        if _has_filter(temperature, top_k, top_p, min_p, VOCAB):
            padded = tl.where(inside, score, float("-inf"))
            tl.store(scores_ptr + row * (PADDED_VOCAB + MAX_CANDIDATES) + token, padded, mask=token < PADDED_VOCAB)
            groups = tl.max(tl.reshape(score, (BLOCK // GROUP, GROUP)), axis=1)
            group = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
            tl.store(group_max_ptr + row * (NUM_BLOCKS * (BLOCK // GROUP)) + group, groups)
        elif temperature > 0.0:
            noise = gumbel_block(tl.load(seed_ptr + slot), tl.load(positions_ptr + row), block * BLOCK, BLOCK)
            score = tl.div_rn(score, tl.maximum(temperature, _MIN_TEMPERATURE)) + noise
    best = tl.max(tl.where(inside, pack(score, token), NO_TOKEN), axis=0)
    tl.store(block_best_ptr + row * NUM_BLOCKS + block, best)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr", "last_token_ids_ptr", "out_ptr"])
def _choose_kernel(
    slots_ptr,  # [R]
    positions_ptr,  # [R]
    temperature_ptr,  # [S], as all of the state that follows
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    repetition_penalty_ptr,
    presence_penalty_ptr,
    frequency_penalty_ptr,
    seed_ptr,
    token_counts_ptr,  # [S, VOCAB]
    block_best_ptr,  # [R, NUM_BLOCKS]
    scores_ptr,  # [R, PADDED_VOCAB + MAX_CANDIDATES] fp32; the candidates go behind the row
    group_max_ptr,  # [R, GROUPS_STRIDE] fp32
    candidate_ids_ptr,  # [R, MAX_CANDIDATES] int32
    last_token_ids_ptr,  # [S] int64 or None
    out_ptr,  # [R] int64
    VOCAB: tl.constexpr,
    PADDED_VOCAB: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_STRIDE: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    SEARCH_BLOCK: tl.constexpr,
    DRAW_BLOCK: tl.constexpr,
    GREEDY: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        tl.store(out_ptr + row, 0)
        return
    block = tl.arange(0, PADDED_BLOCKS)
    best = tl.load(block_best_ptr + row * NUM_BLOCKS + block, mask=block < NUM_BLOCKS, other=NO_TOKEN)
    best = tl.max(best, axis=0)
    if not GREEDY:
        temperature = tl.load(temperature_ptr + slot)
        top_k, top_p, min_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)
        if _has_filter(temperature, top_k, top_p, min_p, VOCAB):
            best = filter_and_draw(
                scores_ptr + row * (PADDED_VOCAB + MAX_CANDIDATES), group_max_ptr + row * GROUPS_STRIDE,
                candidate_ids_ptr + row * MAX_CANDIDATES, packed_score(best), temperature, top_k, top_p,
                min_p, tl.load(seed_ptr + slot), tl.load(positions_ptr + row),
                VOCAB, PADDED_VOCAB, NUM_GROUPS, MAX_CANDIDATES, SEARCH_BLOCK, DRAW_BLOCK,
            )  # fmt: skip
    token = packed_token(best)
    tl.store(out_ptr + row, token)
    if last_token_ids_ptr is not None:
        tl.store(last_token_ids_ptr + slot, token)
    if not GREEDY:
        repetition_penalty = tl.load(repetition_penalty_ptr + slot)
        presence_penalty = tl.load(presence_penalty_ptr + slot)
        frequency_penalty = tl.load(frequency_penalty_ptr + slot)
        if _has_penalty(repetition_penalty, presence_penalty, frequency_penalty):
            count_ptr = token_counts_ptr + slot * VOCAB + token
            tl.store(count_ptr, tl.load(count_ptr) + 1)


def sample_tokens(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    state: SamplingState,
    greedy: bool,
    last_token_ids: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch on checked arguments; see sampling.sample_tokens."""
    num_rows, vocab_size = logits.shape
    if not num_rows:
        return out
    device, pdl = logits.device, use_pdl(logits.device)
    num_blocks = triton.cdiv(vocab_size, SCORE_BLOCK)
    padded_vocab = triton.cdiv(vocab_size, ALIGNMENT.value) * ALIGNMENT.value
    groups_stride = num_blocks * (SCORE_BLOCK // GROUP)
    block_best = torch.empty((num_rows, num_blocks), dtype=torch.int64, device=device)
    scores = group_max = candidate_ids = None
    if not greedy:
        scores = torch.empty((num_rows, padded_vocab + MAX_CANDIDATES), dtype=torch.float32, device=device)
        group_max = torch.empty((num_rows, groups_stride), dtype=torch.float32, device=device)
        candidate_ids = torch.empty((num_rows, MAX_CANDIDATES), dtype=torch.int32, device=device)
    _score_kernel[(num_rows, num_blocks)](
        logits, slots, positions, *state, block_best, scores, group_max,
        VOCAB=vocab_size, PADDED_VOCAB=padded_vocab, MAX_CANDIDATES=MAX_CANDIDATES, BLOCK=SCORE_BLOCK,
        NUM_BLOCKS=num_blocks, GROUP=GROUP, GREEDY=greedy, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    _choose_kernel[(num_rows,)](
        slots, positions, *state, block_best, scores, group_max, candidate_ids, last_token_ids, out,
        VOCAB=vocab_size, PADDED_VOCAB=padded_vocab, NUM_BLOCKS=num_blocks,
        PADDED_BLOCKS=triton.next_power_of_2(num_blocks), NUM_GROUPS=triton.cdiv(vocab_size, GROUP),
        GROUPS_STRIDE=groups_stride, MAX_CANDIDATES=MAX_CANDIDATES, SEARCH_BLOCK=SEARCH_BLOCK, DRAW_BLOCK=DRAW_BLOCK,
        GREEDY=greedy, PDL=pdl, num_warps=1 if greedy else 16, launch_pdl=pdl,
    )  # fmt: skip
    return out
