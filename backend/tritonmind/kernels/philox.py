"""Counter-based random numbers (Philox 4x32, 10 rounds), the same bits as Triton's tl.rand and tl.philox.

A number is a function of its key and counter alone: no state, and nothing of the rest of the batch. Words are kept in
int64 tensors holding 0..2^32-1, because torch has no arithmetic on uint32.
"""

import torch

ROUNDS = 10
WORD_MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# Triton's: the largest factor for which 2^31 - 1 still maps below 1 in fp32.
WORD_TO_UNIFORM = 4.6566127342e-10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _multiply(word: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 64-bit product. The product may wrap into the sign bit, which the mask takes back."""
    product = word * multiplier
    return (product >> 32).bitwise_and_(WORD_MASK), product.bitwise_and_(WORD_MASK)


def philox(seed: torch.Tensor, counter: Words) -> Words:
    """Four random words for each element of the broadcast counter; seed is int64 with the bits of an uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD_MASK, (seed >> 32) & WORD_MASK
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(c0, MULTIPLIERS[0])
        high_2, low_2 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0 = (k0 + KEY_STEPS[0]) & WORD_MASK
        k1 = (k1 + KEY_STEPS[1]) & WORD_MASK
    return c0, c1, c2, c3


def _to_uniform(words: torch.Tensor) -> torch.Tensor:
    """Words to fp32 in [0, 1): a negative int32 is folded to its complement, then scaled."""
    signed = words.to(torch.int32)
    return torch.where(signed < 0, ~signed, signed).float() * WORD_TO_UNIFORM


def philox_uniform(seed: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """What tl.rand(seed[b], offset[b]) gives, bit for bit.

    seed: [B] int64 with the bits of an uint64. offset: [B, n] int64; its low and high word are the counter.
    Returns [B, n] fp32 in [0, 1).
    """
    low, high = offset & WORD_MASK, (offset >> 32) & WORD_MASK
    zero = torch.zeros((), dtype=torch.int64, device=offset.device)
    return _to_uniform(philox(seed.unsqueeze(1), (low, high, zero, zero))[0])


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise for every token, so that argmax(logits / temperature + noise) samples the softmax.

    Token t of row b takes word t % 4 of philox(seed[b], counter (t // 4, position[b], 0, 0)), so a row depends on its
    seed and position alone. seeds, positions: [B] int64. Returns [B, vocab_size] fp32, all finite.
    """
    num_rows, device = len(seeds), seeds.device
    groups = torch.arange(-(-vocab_size // 4), device=device).unsqueeze(0)
    position = (positions.unsqueeze(1) & WORD_MASK).to(torch.int64)
    zero = torch.zeros((1, 1), dtype=torch.int64, device=device)
    words = torch.stack(philox(seeds.unsqueeze(1), (groups, position, zero, zero)), dim=-1)
    uniform = _to_uniform(words).view(num_rows, -1)[:, :vocab_size]
    # A zero would be a noise of -inf; the next value of the grid is WORD_TO_UNIFORM.
    return uniform.clamp(min=WORD_TO_UNIFORM / 2).log_().neg_().log_().neg_()
