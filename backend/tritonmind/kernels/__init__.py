"""The operations of a decoder step: Triton kernels on a GPU, torch on a CPU. They take tensors and numbers only."""

from tritonmind.kernels.activation import silu_mul
from tritonmind.kernels.attention import paged_decode_attention, paged_prefill_attention
from tritonmind.kernels.norm import add_rms_norm, rms_norm
from tritonmind.kernels.philox import gumbel_noise, philox_uniform
from tritonmind.kernels.rotary import rotary_kv_write

__all__ = [
    "add_rms_norm",
    "gumbel_noise",
    "paged_decode_attention",
    "paged_prefill_attention",
    "philox_uniform",
    "rms_norm",
    "rotary_kv_write",
    "silu_mul",
]
