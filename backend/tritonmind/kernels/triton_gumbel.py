"""philox.gumbel_noise inside a kernel: the same words, for a block of adjacent tokens or for any tokens."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a jit function: only constexpr may stand there.

import triton
import triton.language as tl

from tritonmind.kernels.philox import WORD_TO_UNIFORM

_SMALLEST_UNIFORM = tl.constexpr(WORD_TO_UNIFORM / 2)


@triton.jit
def _gumbel(words):
    uniform = tl.maximum(tl.uint_to_uniform_float(words), _SMALLEST_UNIFORM)
    return -tl.log(-tl.log(uniform))


@triton.jit
def gumbel_block(seed, position, first_token, BLOCK: tl.constexpr):
    """Noise of BLOCK adjacent tokens, four of them from the words of one counter."""
    counter = first_token // 4 + tl.arange(0, BLOCK // 4)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + position, zero, zero)
    return _gumbel(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,)))


@triton.jit
def gumbel_at(seed, position, token):
    """Noise of any tokens."""
    zero = token * 0
    w0, w1, w2, w3 = tl.philox(seed, token // 4, zero + position, zero, zero)
    word = token % 4
    return _gumbel(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)))
