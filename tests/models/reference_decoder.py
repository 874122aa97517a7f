"""Decoders that Transformers has no class for, in plain torch, from the published description of each.

InternLM (v1), InternLM2, Qwen (v1), Baichuan 1 and 2 of 7B. Weights are read by the checkpoints' own names, whole
sequences are computed at once, and nothing of tritonmind is imported: what agrees with this was read right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

Weights = Mapping[str, torch.Tensor]
Config = Mapping[str, Any]


def reference_logits(config: Config, weights: Weights, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocab_size] fp32."""
    return {
        "InternLMForCausalLM": _internlm,
        "InternLM2ForCausalLM": _internlm2,
        "QWenLMHeadModel": _qwen,
        "BaiChuanForCausalLM": _baichuan,
        "BaichuanForCausalLM": _baichuan,
    }[config["architectures"][0]](config, weights, torch.tensor(token_ids))


def _internlm(config: Config, weights: Weights, token_ids: torch.Tensor) -> torch.Tensor:
    """Llama with biases on q, k, v and o, and dynamic NTK from `rotary`."""
    heads = config["num_attention_heads"]
    head_dim = config["hidden_size"] // heads
    rotary = config.get("rotary") or {"base": 10000, "type": "dynamic"}
    base = float(rotary["base"])
    if rotary["type"] == "dynamic":
        base = _dynamic_base(base, rotary.get("scaling_factor", 1.0), config, head_dim, len(token_ids))
    angles = _angles(base, head_dim, len(token_ids))
    x = weights["model.embed_tokens.weight"][token_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = _norm(x, weights[f"{layer}.input_layernorm.weight"], config["rms_norm_eps"])
        q, k, v = (
            _linear(weights, f"{layer}.self_attn.{name}_proj", h).view(len(h), heads, head_dim) for name in "qkv"
        )
        x = x + _linear(weights, f"{layer}.self_attn.o_proj", _attend(_rotate(q, angles), _rotate(k, angles), v))
        h = _norm(x, weights[f"{layer}.post_attention_layernorm.weight"], config["rms_norm_eps"])
        gate, up = (_linear(weights, f"{layer}.mlp.{name}_proj", h) for name in ("gate", "up"))
        x = x + _linear(weights, f"{layer}.mlp.down_proj", F.silu(gate) * up)
    x = _norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return x @ weights[head].T


def _internlm2(config: Config, weights: Weights, token_ids: torch.Tensor) -> torch.Tensor:
    """wqkv has, for each head of k and v, the heads of q that share it, then k, then v. w1 is the gate, w3 is up."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, group = config["hidden_size"] // heads, heads // kv_heads
    scaling, base = config.get("rope_scaling"), float(config["rope_theta"])
    angles = _angles(base, head_dim, len(token_ids))
    if scaling and scaling["type"] == "dynamic":
        base = _dynamic_base(base, scaling["factor"], config, head_dim, len(token_ids))
        angles = _angles(base, head_dim, len(token_ids))
    elif scaling:
        assert scaling["type"] == "linear"
        angles = angles / scaling["factor"]
    x = weights["model.tok_embeddings.weight"][token_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = _norm(x, weights[f"{layer}.attention_norm.weight"], config["rms_norm_eps"])
        packed = _linear(weights, f"{layer}.attention.wqkv", h).view(len(h), kv_heads, group + 2, head_dim)
        q = packed[:, :, :group].reshape(len(h), heads, head_dim)
        k, v = (packed[:, :, at].repeat_interleave(group, dim=1) for at in (-2, -1))
        x = x + _linear(weights, f"{layer}.attention.wo", _attend(_rotate(q, angles), _rotate(k, angles), v))
        h = _norm(x, weights[f"{layer}.ffn_norm.weight"], config["rms_norm_eps"])
        gate, up = (_linear(weights, f"{layer}.feed_forward.{name}", h) for name in ("w1", "w3"))
        x = x + _linear(weights, f"{layer}.feed_forward.w2", F.silu(gate) * up)
    x = _norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    return x @ weights["output.weight" if not config["tie_word_embeddings"] else "model.tok_embeddings.weight"].T


def _qwen(config: Config, weights: Weights, token_ids: torch.Tensor) -> torch.Tensor:
    """c_attn is q, k and v, with a bias; the MLP is w1 times silu of w2. Beyond seq_length: NTK's alpha, and logn."""
    heads, head_dim, length = config["num_attention_heads"], config["kv_channels"], len(token_ids)
    base, trained = float(config["rotary_emb_base"]), config["seq_length"]
    if config["use_dynamic_ntk"]:
        alpha = max(2 ** math.ceil(math.log(length / trained, 2) + 1) - 1, 1)
        base *= alpha ** (head_dim / (head_dim - 2))
    angles = _angles(base, head_dim, length)
    positions = torch.arange(1, length + 1).float()
    logn = torch.where(positions > trained, positions.log() / math.log(trained), 1.0).view(-1, 1, 1)
    x = weights["transformer.wte.weight"][token_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        h = _norm(x, weights[f"{layer}.ln_1.weight"], config["layer_norm_epsilon"])
        q, k, v = _linear(weights, f"{layer}.attn.c_attn", h).view(length, 3, heads, head_dim).unbind(1)
        q, k = _rotate(q, angles), _rotate(k, angles)
        if config["use_logn_attn"]:
            q = q * logn
        x = x + _linear(weights, f"{layer}.attn.c_proj", _attend(q, k, v))
        h = _norm(x, weights[f"{layer}.ln_2.weight"], config["layer_norm_epsilon"])
        up, gate = (_linear(weights, f"{layer}.mlp.{name}", h) for name in ("w1", "w2"))
        x = x + _linear(weights, f"{layer}.mlp.c_proj", up * F.silu(gate))
    x = _norm(x, weights["transformer.ln_f.weight"], config["layer_norm_epsilon"])
    return x @ weights["lm_head.weight"].T


def _baichuan(config: Config, weights: Weights, token_ids: torch.Tensor) -> torch.Tensor:
    """W_pack is q, k and v. Baichuan 2 divides the rows of its head by their lengths."""
    heads = config["num_attention_heads"]
    head_dim, length = config["hidden_size"] // heads, len(token_ids)
    angles = _angles(10000.0, head_dim, length)
    x = weights["model.embed_tokens.weight"][token_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = _norm(x, weights[f"{layer}.input_layernorm.weight"], config["rms_norm_eps"])
        q, k, v = _linear(weights, f"{layer}.self_attn.W_pack", h).view(length, 3, heads, head_dim).unbind(1)
        x = x + _linear(weights, f"{layer}.self_attn.o_proj", _attend(_rotate(q, angles), _rotate(k, angles), v))
        h = _norm(x, weights[f"{layer}.post_attention_layernorm.weight"], config["rms_norm_eps"])
        gate, up = (_linear(weights, f"{layer}.mlp.{name}_proj", h) for name in ("gate", "up"))
        x = x + _linear(weights, f"{layer}.mlp.down_proj", F.silu(gate) * up)
    x = _norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    head = weights["lm_head.weight"]
    if config["architectures"] == ["BaichuanForCausalLM"]:
        head = head / head.norm(dim=1, keepdim=True)
    return x @ head.T


def _dynamic_base(base: float, factor: float, config: Config, head_dim: int, length: int) -> float:
    """The base for sequences of up to the trained length times the least power of two that holds this one."""
    trained = config["max_position_embeddings"]
    times = 1
    while trained * times < length:
        times *= 2
    return float(base * (factor * times - (factor - 1)) ** (head_dim / (head_dim - 2)))


def _angles(base: float, head_dim: int, length: int) -> torch.Tensor:
    return torch.arange(length).float()[:, None] / base ** (torch.arange(0, head_dim, 2).float() / head_dim)


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim], angles [tokens, head_dim / 2]."""
    cos, sin = torch.cat((angles, angles), 1).cos()[:, None], torch.cat((angles, angles), 1).sin()[:, None]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias
