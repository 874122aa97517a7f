"""A decoder layer in plain torch, fp32, with its inner values open to whoever measures them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tritonmind.config import ModelConfig
from tritonmind.kernels import reference

# What each linear reads, by the linear's name in tensor_layout; w3 reads what w1 does.
QKV, WO, W1, W3, W2 = "attention.w_qkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"
LINEAR_INPUTS = (QKV, WO, W1, W2)
# The cache of a layer: K after the rotary embedding, V as it is.
KEY, VALUE = "key", "value"

# Called with one of the names above and the value of all tokens: [T, channels], K and V [T, num_kv_heads, head_dim].
Observe = Callable[[str, torch.Tensor], None]


def _ignore(name: str, value: torch.Tensor) -> None:
    pass


@dataclass(frozen=True)
class DecoderLayer:
    """Weights as torch has them, [out, in], all fp32 and on one device. cos_sin: [positions, head_dim],
    as in layers.rotary.RotaryTable, for sequences of the length that `forward` gets.
    """

    model: ModelConfig
    cos_sin: torch.Tensor
    attention_norm: torch.Tensor
    w_qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    wo: torch.Tensor
    o_bias: torch.Tensor | None
    ffn_norm: torch.Tensor
    w1: torch.Tensor
    w3: torch.Tensor
    w2: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None

    @classmethod
    def from_tensors(
        cls, model: ModelConfig, cos_sin: torch.Tensor, tensors: Mapping[str, torch.Tensor]
    ) -> DecoderLayer:
        """tensors: those of a layer by tensor_layout, without layer number and rank."""
        return cls(
            model=model,
            cos_sin=cos_sin,
            attention_norm=tensors["attention_norm.weight"],
            w_qkv=tensors[f"{QKV}.weight"],
            qkv_bias=tensors.get(f"{QKV}.bias"),
            wo=tensors[f"{WO}.weight"],
            o_bias=tensors.get(f"{WO}.bias"),
            ffn_norm=tensors["ffn_norm.weight"],
            w1=tensors[f"{W1}.weight"],
            w3=tensors[f"{W3}.weight"],
            w2=tensors[f"{W2}.weight"],
            q_norm=tensors.get("attention.q_norm.weight"),
            k_norm=tensors.get("attention.k_norm.weight"),
        )

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of q, k and v in w_qkv."""
        kv_size = self.model.num_kv_heads * self.model.head_dim
        return self.model.num_heads * self.model.head_dim, kv_size, kv_size

    def replace(self, **weights: Any) -> DecoderLayer:
        """This layer with some other weights."""
        return dataclasses.replace(self, **weights)

    def forward(self, hidden: torch.Tensor, observe: Observe = _ignore) -> torch.Tensor:
        """hidden [T, hidden_size] of one sequence from its beginning -> the same after this layer."""
        eps = self.model.norm_eps
        hidden = hidden + self.attention(reference.rms_norm(hidden, self.attention_norm, eps=eps), observe)
        return hidden + self.feed_forward(reference.rms_norm(hidden, self.ffn_norm, eps=eps), observe)

    def attention(self, x: torch.Tensor, observe: Observe = _ignore) -> torch.Tensor:
        """x [T, hidden_size], normalised -> the attention block's output [T, hidden_size]."""
        model, num_tokens = self.model, x.shape[0]
        observe(QKV, x)
        heads = F.linear(x, self.w_qkv, self.qkv_bias).view(num_tokens, -1, model.head_dim)
        q, k, v = heads.split((model.num_heads, model.num_kv_heads, model.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q = reference.rms_norm(q, self.q_norm, eps=model.norm_eps)
            k = reference.rms_norm(k, self.k_norm, eps=model.norm_eps)
        positions = torch.arange(num_tokens, device=x.device)
        q, k = reference.rotate(q, self.cos_sin, positions), reference.rotate(k, self.cos_sin, positions)
        observe(KEY, k)
        observe(VALUE, v)
        # Repeated here: with enable_gqa, torch has no memory-saving kernel for fp32 on a GPU.
        group = model.num_heads // model.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
        seen = None
        if 0 < model.sliding_window < num_tokens:
            seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=x.device).tril()
            seen = seen.triu(1 - model.sliding_window)
        attended = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None)
        attended = attended.squeeze(0).transpose(0, 1).reshape(num_tokens, -1)
        observe(WO, attended)
        return F.linear(attended, self.wo, self.o_bias)

    def feed_forward(self, x: torch.Tensor, observe: Observe = _ignore) -> torch.Tensor:
        """x [T, hidden_size], normalised -> the feed-forward block's output [T, hidden_size]."""
        observe(W1, x)
        gated = F.silu(F.linear(x, self.w1)) * F.linear(x, self.w3)
        observe(W2, gated)
        return F.linear(gated, self.w2)
