"""The operations of a decoder step: Triton kernels on a GPU, torch on a CPU. They take tensors and numbers only."""

from tritonmind.kernels.activation import silu_mul
from tritonmind.kernels.attention import (
    AttentionVariants,
    attention_variants,
    paged_decode_attention,
    paged_prefill_attention,
    plan_decode,
)
from tritonmind.kernels.decode_plan import DecodePlan
from tritonmind.kernels.flat_pages import FlatPages, plan_flat_pages
from tritonmind.kernels.gather import gather_rows
from tritonmind.kernels.head_norms import HeadNorms
from tritonmind.kernels.int8_linear import int8_linear
from tritonmind.kernels.kv_quant import KVScales, LayerScales, TokenScales
from tritonmind.kernels.linear import gate_up, linear, product_variants
from tritonmind.kernels.logit_edits import edit_logits
from tritonmind.kernels.logprobs import TokenLogprobs, token_logprobs
from tritonmind.kernels.norm import add_rms_norm, rms_norm
from tritonmind.kernels.philox import gumbel_noise, philox_uniform
from tritonmind.kernels.rotary import rotary_kv_write
from tritonmind.kernels.sampling import sample_tokens
from tritonmind.kernels.sampling_state import PROMPT_FLAG, SamplingState
from tritonmind.kernels.step_inputs import (
    DecodeInputs,
    TokenInputs,
    prepare_decodes,
    prepare_tokens,
    write_block_tables,
)
from tritonmind.kernels.token_mask import mask_tokens, mask_words
from tritonmind.kernels.w4_linear import w4_gate_up, w4_linear, w4_scratch_elements, w4_variants

__all__ = [
    "PROMPT_FLAG",
    "AttentionVariants",
    "DecodeInputs",
    "DecodePlan",
    "FlatPages",
    "HeadNorms",
    "KVScales",
    "LayerScales",
    "SamplingState",
    "TokenInputs",
    "TokenLogprobs",
    "TokenScales",
    "add_rms_norm",
    "attention_variants",
    "edit_logits",
    "gate_up",
    "gather_rows",
    "gumbel_noise",
    "int8_linear",
    "linear",
    "mask_tokens",
    "mask_words",
    "paged_decode_attention",
    "paged_prefill_attention",
    "philox_uniform",
    "plan_decode",
    "plan_flat_pages",
    "prepare_decodes",
    "prepare_tokens",
    "product_variants",
    "rms_norm",
    "rotary_kv_write",
    "sample_tokens",
    "silu_mul",
    "token_logprobs",
    "w4_gate_up",
    "w4_linear",
    "w4_scratch_elements",
    "w4_variants",
    "write_block_tables",
]
