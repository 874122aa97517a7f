"""The Llama family's decoder: pre-norm attention and gated MLP, rotary positions, grouped-query attention."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

import torch
from torch import nn

from tritonmind.config import ModelConfig
from tritonmind.kernels import gather_rows
from tritonmind.layers.attention import Attention, with_attention_plans
from tritonmind.layers.int4_linear import Int4GatedLinear, Int4Linear, share_scratch
from tritonmind.layers.linear import GatedLinear, Int8Linear, Linear, Product
from tritonmind.layers.norm import RMSNorm
from tritonmind.layers.rotary import RotaryTable, rotary_table
from tritonmind.model_inputs import KVCache, ModelInputs

KVCaches = SequenceABC[KVCache]


class HiddenStates(NamedTuple):
    """What the layers leave of each token: the last one's output, and the residual stream that it is to be added to."""

    x: torch.Tensor  # [num_tokens, hidden_size], or partial sums of it; residual itself if it has been added
    residual: torch.Tensor  # [num_tokens, hidden_size]

    def take(self, rows: torch.Tensor) -> HiddenStates:
        """Those of the tokens in `rows` [n] int32."""
        residual = gather_rows(self.residual, rows)
        if self.x is self.residual:
            return HiddenStates(residual, residual)
        return HiddenStates(gather_rows(self.x, rows) if self.x.dim() == 2 else self.x.index_select(1, rows), residual)


class LlamaLayer(nn.Module):
    """One decoder layer. The residual stream travels beside the activations, so that each add fuses with a norm."""

    def __init__(self, config: ModelConfig, window: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * head_dim
        inter = config.intermediate_size
        self.attention_norm = RMSNorm(hidden, eps=config.norm_eps, dtype=dtype, device=device)
        self.w_qkv = _linear(config, hidden, qkv_size, bias=config.qkv_bias, dtype=dtype, device=device)
        self.attention = Attention(
            config.num_heads, config.num_kv_heads, head_dim, window=window,
            norm_eps=config.norm_eps if config.qk_norm else 0.0, dtype=dtype, device=device,
        )  # fmt: skip
        self.wo = _linear(config, config.num_heads * head_dim, hidden, bias=config.o_bias, dtype=dtype, device=device)
        self.ffn_norm = RMSNorm(hidden, eps=config.norm_eps, dtype=dtype, device=device)
        self.w13 = _gated_linear(config, hidden, inter, dtype=dtype, device=device)
        self.w2 = _linear(config, inter, hidden, bias=False, dtype=dtype, device=device)

    def forward(
        self,
        x: torch.Tensor,  # [num_tokens, hidden_size]
        residual: torch.Tensor | None,
        table: RotaryTable,
        inputs: ModelInputs,
        kv_cache: KVCache,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """rows: [n] int32, the tokens that the results are wanted of; None for all. K and V are written of all."""
        x, residual = self.attention_norm(x, residual)
        # What comes out of w_qkv, wo and w2 may be partial sums: the kernel that reads it adds them up. All go by one
        # name, so that none outlives its reader: q, k and v are as large as anything in a layer.
        x = self.w_qkv(x, partial_sums=True)
        x = self.attention(x, table, inputs.positions, kv_cache, inputs.attention)
        if rows is not None:
            x, residual = gather_rows(x, rows), gather_rows(residual, rows)
        x, residual = self.ffn_norm(self.wo(x, partial_sums=True, add_to=residual), residual)
        return self.w2(self.w13(x), partial_sums=True, add_to=residual), residual


class LlamaForCausalLM(nn.Module):
    """Token ids and positions in, logits of the asked-for rows out."""

    tok_embeddings: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        lm_head_int8: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer(
            "tok_embeddings", torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )
        # A window as long as any sequence is none.
        self.window = config.sliding_window if config.sliding_window < max_model_len else 0
        self.layers = nn.ModuleList(LlamaLayer(config, self.window, dtype, device) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, device=device)
        self.output = (Int8Linear if lm_head_int8 else Linear)(
            config.hidden_size,
            config.vocab_size,
            bias=False,
            dtype=dtype,
            device=device,
            weight=self.tok_embeddings if config.tie_word_embeddings else None,
        )
        self.rotary_table = rotary_table(config, max_model_len, device)

    def forward(self, inputs: ModelInputs, kv_caches: KVCaches, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """-> logits [num_samples, vocab_size], in `out` if given. Writes the step's K and V into `kv_caches`."""
        return self.logits(self.hidden_states(inputs, kv_caches, rows=inputs.logits_rows), None, out=out)

    def hidden_states(
        self, inputs: ModelInputs, kv_caches: KVCaches, *, rows: torch.Tensor | None = None
    ) -> HiddenStates:
        """Run the layers over the step's tokens.

        rows: [n] int32, the tokens whose hidden states are wanted, None for all. Of the others the last layer computes
        K and V only: with one row a prompt, that saves most of a layer.
        """
        dtype = self.tok_embeddings.dtype
        inputs = with_attention_plans(
            inputs, kv_caches[0], num_heads=self.config.num_heads, window=self.window, dtype=dtype
        )
        x = gather_rows(self.tok_embeddings, inputs.token_ids)
        residual: torch.Tensor | None = None
        last = self.layers[-1]
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x, residual = layer(x, residual, self.rotary_table, inputs, kv_cache, rows if layer is last else None)
        assert residual is not None  # a model has at least one layer
        return HiddenStates(x, residual)

    def logits(
        self, hidden: HiddenStates, rows: torch.Tensor | None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the tokens in `rows`, of all for None, which uses `hidden` up."""
        x, _ = self.norm(*(hidden if rows is None else hidden.take(rows)))
        return self.output(x, out=out)

    def row_variants(self, max_tokens: int, max_samples: int) -> list[int]:
        """Sizes of steps that between them use every kernel for products, on a GPU.

        A step of n tokens is meant, with logits for each of them where max_samples allows it.
        """
        rows = set(self.output.row_variants(max_samples))
        for module in self.modules():
            if isinstance(module, Product) and module is not self.output:
                rows.update(module.row_variants(max_tokens))
        return sorted(rows)

    def finalize(self) -> None:
        """Repack weights for the device, once, after all of them were loaded."""
        products = [module for module in self.modules() if isinstance(module, Product)]
        for product in products:
            product.finalize()

    def share_scratch(self, max_tokens: int) -> None:
        """Room for 4-bit weights that steps of up to `max_tokens` tokens write out, if any do; after `finalize`."""
        share_scratch([module for module in self.modules() if isinstance(module, Int4Linear)], max_tokens)


def _linear(
    config: ModelConfig, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
) -> Product:
    """A layer's linear, in the type that its weight is stored in."""
    if config.weight_type == "int4":
        group_size = config.group_size
        return Int4Linear(in_features, out_features, group_size=group_size, bias=bias, dtype=dtype, device=device)
    return Linear(in_features, out_features, bias=bias, dtype=dtype, device=device)


def _gated_linear(
    config: ModelConfig, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device
) -> Int4GatedLinear | GatedLinear:
    if config.weight_type == "int4":
        return Int4GatedLinear(in_features, out_features, group_size=config.group_size, dtype=dtype, device=device)
    return GatedLinear(in_features, out_features, dtype=dtype, device=device)
