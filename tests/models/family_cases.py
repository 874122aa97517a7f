"""A tiny checkpoint with random weights for each architecture and for what changes its arithmetic, and its reference.

`make` writes it and gives what computes its logits independently of us: Transformers' class, or reference_decoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from tests.checkpoints import LLAMA3_ROPE, make_tokenizer
from tests.models.reference_decoder import reference_logits

VOCAB, HIDDEN, INTER, LAYERS, HEADS, HEAD_DIM = 320, 64, 96, 2, 4, 16
TRAINED = 64  # max_position_embeddings of the cases that go beyond it
DYNAMIC = (TRAINED, 2 * TRAINED)  # of dynamic NTK up to four times that
Logits = Callable[[list[int]], torch.Tensor]

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GQA = {**_LLAMA, "num_key_value_heads": 2}
_MISTRAL = {**_GQA, "model_type": "mistral", "head_dim": HEAD_DIM, "sliding_window": None}
_QWEN2 = {**_GQA, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 40, "max_window_layers": 1}
_QWEN3 = {**_QWEN2, "model_type": "qwen3", "head_dim": 32}
_QWEN = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 2 * INTER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "kv_channels": HEAD_DIM, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True, "seq_length": TRAINED,
    "max_position_embeddings": 512, "use_dynamic_ntk": True, "use_logn_attn": True, "tie_word_embeddings": False,
    "model_type": "qwen",
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}


class Case(NamedTuple):
    """An architecture and its config.json. rope_limits: lengths beyond which it has other rotary frequencies."""

    architecture: str
    config: dict[str, Any]
    session_len: int = 512
    rope_limits: tuple[int, ...] = ()


def _rope(config: dict[str, Any], **rope: Any) -> dict[str, Any]:
    return {**config, "max_position_embeddings": TRAINED, "rope_scaling": rope, "rope_theta": 10000.0}


CASES = {
    "llama": Case("LlamaForCausalLM", {**_GQA, "model_type": "llama"}),
    "llama-biases-tied": Case(
        "LlamaForCausalLM", {**_GQA, "model_type": "llama", "attention_bias": True, "tie_word_embeddings": True}
    ),
    "llama-linear": Case(
        "LlamaForCausalLM", _rope({**_GQA, "model_type": "llama"}, rope_type="linear", factor=4.0), 256
    ),
    "llama-llama3": Case("LlamaForCausalLM", _rope({**_GQA, "model_type": "llama"}, **LLAMA3_ROPE), 256),
    "llama-dynamic": Case(
        "LlamaForCausalLM", _rope({**_GQA, "model_type": "llama"}, rope_type="dynamic", factor=2.0), 256, DYNAMIC
    ),
    "llama-longrope": Case(
        "LlamaForCausalLM",
        _rope(
            {**_GQA, "model_type": "llama"}, rope_type="longrope", factor=4.0, original_max_position_embeddings=TRAINED,
            short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[1.0 + 0.7 * i for i in range(8)],
        ),
        256,
        (TRAINED,),
    ),
    "mistral": Case("MistralForCausalLM", _MISTRAL),
    "mistral-window": Case("MistralForCausalLM", {**_MISTRAL, "sliding_window": 40}),
    "qwen2": Case("Qwen2ForCausalLM", _QWEN2),
    "qwen2-tied-yarn": Case("Qwen2ForCausalLM", {**_rope(_QWEN2, **_YARN), "tie_word_embeddings": True}, 256),
    "qwen2-window": Case("Qwen2ForCausalLM", {**_QWEN2, "use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": Case("Qwen3ForCausalLM", _QWEN3),
    "qwen3-biases-tied-yarn": Case(
        "Qwen3ForCausalLM",
        {**_rope(_QWEN3, **_YARN, mscale=0.7, mscale_all_dim=1.2, truncate=False, beta_fast=16.0, beta_slow=2.0),
         "attention_bias": True, "tie_word_embeddings": True},
        256,
    ),
    "internlm3": Case(
        "InternLM3ForCausalLM",
        {**_GQA, "model_type": "internlm3", "head_dim": HEAD_DIM, "qkv_bias": False, "bias": False,
         "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}, "rope_theta": 5e7},
    ),
    "internlm": Case("InternLMForCausalLM", {**_LLAMA, "model_type": "internlm", "bias": True}),
    "internlm-dynamic": Case(
        "InternLMForCausalLM",
        {**_LLAMA, "model_type": "internlm", "bias": False, "max_position_embeddings": TRAINED,
         "rotary": {"base": 5000, "type": "dynamic", "scaling_factor": 2.0}},
        256, DYNAMIC,
    ),
    "internlm2": Case("InternLM2ForCausalLM", {**_GQA, "model_type": "internlm2", "bias": False, "rope_theta": 1e6}),
    "internlm2-biases-dynamic": Case(
        "InternLM2ForCausalLM",
        {**_rope(_GQA, type="dynamic", factor=2.0), "model_type": "internlm2", "bias": True, "rope_theta": 1e5},
        256, DYNAMIC,
    ),
    "qwen": Case("QWenLMHeadModel", _QWEN, 256, DYNAMIC),
    "qwen-plain": Case(
        "QWenLMHeadModel", {**_QWEN, "seq_length": 512, "use_dynamic_ntk": False, "use_logn_attn": False}
    ),
    "baichuan": Case("BaiChuanForCausalLM", {**_LLAMA, "model_type": "baichuan"}),
    "baichuan2": Case("BaichuanForCausalLM", {**_LLAMA, "model_type": "baichuan", "z_loss_weight": 0}),
}  # fmt: skip


def make(name: str, path: Path, *, seed: int = 5, dtype: torch.dtype = torch.float32, **overrides: Any) -> Logits:
    """Write case `name`, with `overrides` of its config.json, to `path`; what computes its logits in fp32."""
    case = CASES[name]
    config = {**case.config, **overrides, "architectures": [case.architecture]}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    path.mkdir(parents=True)
    make_tokenizer(path, vocab=VOCAB)
    (path / "config.json").write_text(json.dumps(config))
    if case.architecture in _SHAPES:
        weights = _drawn(_SHAPES[case.architecture](config), seed, dtype)
        save_file(weights, path / "model.safetensors")
        whole = {key: value.float() for key, value in weights.items()}
        return lambda token_ids: reference_logits(config, whole, token_ids)
    # Older releases of Transformers do not know InternLM3, which without biases is a Llama.
    known = config if config["model_type"] in CONFIG_MAPPING else {**config, "model_type": "llama"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known)).eval()
    tied = config["tie_word_embeddings"]
    shapes = {key: value.shape for key, value in model.state_dict().items() if not (tied and key == "lm_head.weight")}
    weights = _drawn(shapes, seed, dtype)
    save_file(weights, path / "model.safetensors")
    model.load_state_dict({key: value.float() for key, value in weights.items()}, strict=not tied)

    def logits(token_ids: list[int]) -> torch.Tensor:
        device, rotary, padding = model.lm_head.weight.device, model.model.rotary_emb, 0
        if rotary.rope_type == "dynamic":
            # Its base follows from the length of the call, ours from the next limit: what comes behind is not seen.
            padding = next(limit for limit in (*DYNAMIC, 4 * TRAINED) if limit >= len(token_ids)) - len(token_ids)
            rotary.max_seq_len_cached, rotary.inv_freq = rotary.original_max_seq_len, rotary.original_inv_freq
        with torch.inference_mode():
            ids = torch.tensor([token_ids + [0] * padding], device=device)
            return model(ids).logits[0, : len(token_ids)].cpu()

    return logits


def _drawn(shapes: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every weight is random, norms and biases too, so that no two of them can be mistaken for each other."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(tuple(shape), generator=generator)
        if len(shape) == 2:
            value = noise * (1.5 / math.sqrt(shape[1]))
        else:
            value = 0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise
        weights[name] = value.to(dtype)
    return weights


def _internlm_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
            if config["bias"]:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (HIDDEN,)
        shapes[f"{layer}.self_attn.rotary_emb.inv_freq"] = (HEAD_DIM // 2,)
        shapes |= _mlp(layer)
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def _baichuan_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.self_attn.W_pack.weight"] = (3 * HIDDEN, HIDDEN)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes |= _mlp(layer)
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def _mlp(layer: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{layer}.mlp.gate_proj.weight": (INTER, HIDDEN),
        f"{layer}.mlp.up_proj.weight": (INTER, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, INTER),
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
    }


def _internlm2_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width = HIDDEN + 2 * config["num_key_value_heads"] * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.attention.wqkv.weight"] = (width, HIDDEN)
        shapes[f"{layer}.attention.wo.weight"] = (HIDDEN, HIDDEN)
        if config["bias"]:
            shapes[f"{layer}.attention.wqkv.bias"] = (width,)
            shapes[f"{layer}.attention.wo.bias"] = (HIDDEN,)
        for name, shape in (("w1", (INTER, HIDDEN)), ("w3", (INTER, HIDDEN)), ("w2", (HIDDEN, INTER))):
            shapes[f"{layer}.feed_forward.{name}.weight"] = shape
        shapes[f"{layer}.attention_norm.weight"] = shapes[f"{layer}.ffn_norm.weight"] = (HIDDEN,)
    return {**shapes, "model.norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}


def _qwen_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"transformer.h.{i}"
        shapes[f"{layer}.attn.c_attn.weight"] = (3 * HIDDEN, HIDDEN)
        shapes[f"{layer}.attn.c_attn.bias"] = (3 * HIDDEN,)
        shapes[f"{layer}.attn.c_proj.weight"] = (HIDDEN, HIDDEN)
        for name, shape in (("w1", (INTER, HIDDEN)), ("w2", (INTER, HIDDEN)), ("c_proj", (HIDDEN, INTER))):
            shapes[f"{layer}.mlp.{name}.weight"] = shape
        shapes[f"{layer}.ln_1.weight"] = shapes[f"{layer}.ln_2.weight"] = (HIDDEN,)
    return {**shapes, "transformer.ln_f.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


_SHAPES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "InternLMForCausalLM": _internlm_shapes,
    "InternLM2ForCausalLM": _internlm2_shapes,
    "QWenLMHeadModel": _qwen_shapes,
    "BaiChuanForCausalLM": _baichuan_shapes,
    "BaichuanForCausalLM": _baichuan_shapes,
}
