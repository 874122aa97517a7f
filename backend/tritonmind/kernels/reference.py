"""What each kernel computes, written in plain torch for reading: the tests and benchmarks compare with this.

Signatures are the launchers', without `out`. Arithmetic is fp32, results are rounded once to the input's dtype. The CPU
serving path is cpu.py, which is faster and tested against this page.
"""

import torch

from tritonmind.kernels.head_norms import HeadNorms
from tritonmind.kernels.kv_quant import KVScales, LayerScales, dequantise, quantise, quantise_tokens
from tritonmind.kernels.logprobs import TokenLogprobs
from tritonmind.kernels.philox import gumbel_noise, philox_uniform
from tritonmind.kernels.sampling_state import MIN_TEMPERATURE, PROMPT_FLAG, SamplingState

__all__ = [
    "add_rms_norm",
    "gather_rows",
    "gumbel_noise",
    "paged_decode_attention",
    "paged_prefill_attention",
    "philox_uniform",
    "rms_norm",
    "rotary_kv_write",
    "sample_tokens",
    "silu_mul",
    "token_logprobs",
]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + b for x [T, K] and weight [N, K], in fp32, rounded once. Returns [T, N]."""
    y = x.float() @ weight.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def gate_up(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for [gate | up] = x W^T, in fp32, rounded once. x [T, K], weight [2 * I, K]. Returns [T, I]."""
    gate, up = (x.float() @ weight.float().t()).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """y = round(x / sqrt(mean(x^2) + eps)) * weight for rows of x [T, H]; rounds to x's dtype before the weight."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype).float() * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to residual in place, then normalise the sum as it is stored. Returns (normed, residual), both [T, H].

    x: [T, H], or partial sums [S, T, H].
    """
    residual.copy_((_summed(x) + residual.float()).to(residual.dtype))
    return rms_norm(residual, weight, eps=eps), residual


def _summed(x: torch.Tensor) -> torch.Tensor:
    """In fp32: x [T, N], or the sum of the partial sums x [S, T, N]."""
    return x.float().sum(0) if x.dim() == 3 else x.float()


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) * up for x = [gate | up] of [T, 2 * I]. Returns [T, I]."""
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [T, heads, D], pairing element i with i + D/2. cos_sin [max_pos, D] is [cos | sin]."""
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_kv_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    norms: HeadNorms | None = None,
    query_scales: torch.Tensor | None = None,
    scales: KVScales | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rotate q and k of each token, write k and v to slot block * block_size + offset. Returns q [T, H, D].

    qkv: [T, W], or partial sums [S, T, W], of the caches' dtype or `dtype`. scales: of caches of bytes.
    """
    qkv = _summed(qkv).to(dtype or (k_cache.dtype if scales is None else qkv.dtype))
    q, k, v = qkv.view(len(qkv), -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms.q, eps=norms.eps), rms_norm(k, norms.k, eps=norms.eps)
    k = rotate(k, cos_sin, positions)
    block_size = k_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            at = slot // block_size, slice(None), slot % block_size
            if isinstance(scales, LayerScales):
                k_cache[at] = quantise(k[token], scales.k_scale, scales.k_zero)
                v_cache[at] = quantise(v[token], scales.v_scale, scales.v_zero)
            elif scales is not None:
                k_cache[at], scales.k[at] = quantise_tokens(k[token])
                v_cache[at], scales.v[at] = quantise_tokens(v[token])
            else:
                k_cache[at], v_cache[at] = k[token], v[token]
    q = rotate(q, cos_sin, positions)
    return q if query_scales is None else (q.float() * query_scales[positions.long()].view(-1, 1, 1)).to(q.dtype)


def dequantise_pools(
    k_cache: torch.Tensor, v_cache: torch.Tensor, scales: KVScales | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools of what is stored, fp32 where they are of bytes, else as they are."""
    if scales is None:
        return k_cache, v_cache
    if isinstance(scales, LayerScales):
        return (
            dequantise(k_cache, scales.k_scale, scales.k_zero),
            dequantise(v_cache, scales.v_scale, scales.v_zero),
        )
    return dequantise(k_cache, scales.k.unsqueeze(-1)), dequantise(v_cache, scales.v.unsqueeze(-1))


def gather_pages(cache: torch.Tensor, block_table: torch.Tensor, context_len: int) -> torch.Tensor:
    """The first context_len tokens of one sequence, [num_kv_heads, context_len, D] in fp32."""
    num_kv_heads, block_size, head_dim = cache.shape[1:]
    pages = cache[block_table[: -(-context_len // block_size)].long()]
    return pages.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :context_len].float()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, window: int = 0) -> torch.Tensor:
    """Causal attention of q [Q, H, D], the last Q tokens of k and v [Hkv, L, D]. Returns [Q, H, D] in fp32.

    window: how many tokens a query sees, its own included; 0 is all.
    """
    num_queries, num_heads, _ = q.shape
    num_kv_heads, context_len, _ = k.shape
    group = num_heads // num_kv_heads
    k = k.repeat_interleave(group, dim=0)
    v = v.repeat_interleave(group, dim=0)
    scores = torch.einsum("qhd,hld->hql", q.float(), k) * softmax_scale
    query_positions = torch.arange(context_len - num_queries, context_len, device=q.device)
    distances = query_positions.unsqueeze(1) - torch.arange(context_len, device=q.device)
    hidden = (distances < 0) | (distances >= (window or context_len))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hql,hld->qhd", weights, v)


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    softmax_scale: float,
    window: int = 0,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """One query token a sequence, q [B, H, D], against its pages. Rows of context_len 0 are zeros."""
    out = torch.zeros_like(q)
    k_cache, v_cache = dequantise_pools(k_cache, v_cache, scales)
    for row, context_len in enumerate(context_lens.tolist()):
        if context_len:
            k = gather_pages(k_cache, block_tables[row], context_len)
            v = gather_pages(v_cache, block_tables[row], context_len)
            out[row] = attend(q[row : row + 1], k, v, softmax_scale, window)[0]
    return out


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    softmax_scale: float,
    window: int = 0,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """Queries q [T, H, D] of S sequences one after another; the last of a sequence sits at context_len - 1.

    Query tokens before position 0 (a context_len below the number of queries) and beyond cu_seqlens_q[-1] give zeros.
    """
    out = torch.zeros_like(q)
    k_cache, v_cache = dequantise_pools(k_cache, v_cache, scales)
    starts = cu_seqlens_q.tolist()
    for row, context_len in enumerate(context_lens.tolist()):
        start, end = max(starts[row], starts[row + 1] - context_len), starts[row + 1]
        if start < end:
            k = gather_pages(k_cache, block_tables[row], context_len)
            v = gather_pages(v_cache, block_tables[row], context_len)
            out[start:end] = attend(q[start:end], k, v, softmax_scale, window).to(q.dtype)
    return out


def gather_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of table [N, H] by number. Returns [T, H]."""
    return table[rows.long()]


def penalised_scores(logits: torch.Tensor, slot: int, state: SamplingState) -> torch.Tensor:
    """One row's logits [V] after repetition, frequency and presence penalty, fp32; a NaN counts as -inf."""
    scores, counts = logits.float(), state.token_counts[slot]
    generated = counts % PROMPT_FLAG
    repetition = state.repetition_penalty[slot]
    scores = torch.where(counts == 0, scores, torch.where(scores > 0, scores / repetition, scores * repetition))
    scores = scores - state.frequency_penalty[slot] * generated
    scores = scores - state.presence_penalty[slot] * (generated > 0)
    return scores.masked_fill(scores.isnan(), float("-inf")).clamp(-3.4028234663852886e38, 3.4028234663852886e38)


def kept_tokens(scores: torch.Tensor, slot: int, state: SamplingState) -> torch.Tensor:
    """Which of one row's scores [V] top-k, top-p and min-p leave: [V] bool. Masses are fp64."""
    temperature = max(state.temperature[slot].item(), MIN_TEMPERATURE)
    top_k = state.top_k[slot].item() or len(scores)
    weights = ((scores.double() - scores.max()) / temperature).exp()
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for value in scores.unique():  # ascending; equal scores share their fate
        kept |= (scores == value) & ((scores > value).sum() < top_k)
    total = weights[kept].sum()
    if state.top_p[slot] < 1:
        for value in scores[kept].unique():
            likelier = weights[scores > value].sum() / total
            if likelier >= state.top_p[slot] and value < scores.max():
                kept &= scores != value
    return kept & (weights >= state.min_p[slot].double())


def sample_tokens(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    state: SamplingState,
    *,
    greedy: bool = False,
    last_token_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """What sampling.py says, a row after the other. Returns token ids [R] int64; padding rows are 0.

    greedy promises that no row of the batch has a temperature or a penalty; here it changes nothing.
    """
    token_ids = torch.zeros(len(slots), dtype=torch.int64)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        scores = penalised_scores(logits[row], slot, state)
        temperature = state.temperature[slot]
        if temperature > 0:
            kept = kept_tokens(scores, slot, state)
            noise = gumbel_noise(state.seed[slot].view(1), positions[row].long().view(1), len(scores))[0]
            scores = (scores / temperature.clamp(min=MIN_TEMPERATURE) + noise).masked_fill(~kept, float("-inf"))
        token = int((scores == scores.max()).nonzero()[0])
        token_ids[row] = token
        if last_token_ids is not None:
            last_token_ids[slot] = token
        penalties = (state.repetition_penalty[slot] - 1, state.presence_penalty[slot], state.frequency_penalty[slot])
        if any(penalties):
            state.token_counts[slot, token] += 1
    return token_ids


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, *, num_top: int = 0) -> TokenLogprobs:
    """Log softmax of the raw logits [R, V]: at token_ids [R], and the num_top largest of each row."""
    logprobs = logits.float().log_softmax(dim=1)
    top = logprobs.sort(dim=1, descending=True)
    chosen = logprobs[torch.arange(len(token_ids)), token_ids]
    ascending = top.values.flip(1).contiguous()
    ranks = 1 + logits.shape[1] - torch.searchsorted(ascending, chosen.unsqueeze(1), right=True).squeeze(1)
    return TokenLogprobs(chosen, ranks, top.indices[:, :num_top], top.values[:, :num_top])
