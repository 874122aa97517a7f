"""What we know of each architecture: how its config.json and its tensors differ from Llama's, as tables.

One decoder serves them all. What a checkpoint is, its config.json says in the terms of its own class: here stand the
names of its tensors, its keys where they are not Llama's, what its class has without a key, and what is refused.
Sources: Transformers' classes; of those that come with code of their own, that code's published behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

BAICHUAN_13B_WIDTH = 5120
# Of Baichuan 1, whose head is an ordinary one.
BAICHUAN_1_VOCAB = 64000

Config = Mapping[str, Any]
Refuse = Callable[[str], NoReturn]


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """A checkpoint's names of what tensor_layout lists. `layer` takes a number; what lies in a layer has no prefix.

    qkv: three modules, or one that has the rows of all three: first q, then k, then v, or, with `kv_groups`, for each
    head of k and v in turn the heads of q that share it, that head of k and that of v.
    """

    embedding: str = "model.embed_tokens.weight"
    layer: str = "model.layers.{}"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    kv_groups: bool = False
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    wo: str = "self_attn.o_proj"
    ffn_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    # Of tensors that follow from the configuration, and were once stored all the same.
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How an architecture differs from Llama.

    names: of its tensors. keys: what config.json calls a key of Llama's. defaults: values of Llama's keys where it has
    none. qkv_bias, o_bias: whether there are such biases, or the key that says so. qk_norm: of each head of q and k.
    normalised_head: whether a model with so many tokens divides the rows of its head by their lengths. windowed:
    config.json may ask for a sliding window; where `defaults` have use_sliding_window, that key must ask for it too.
    adapt: makes the configuration Llama's in what no table can say. Raises CheckpointError through `refuse`.
    """

    names: TensorNames = TensorNames()
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    qk_norm: bool = False
    normalised_head: Callable[[int], bool] = lambda vocab_size: False
    windowed: bool = False
    adapt: Callable[[Config, Refuse], Config] | None = None


def _internlm(config: Config, refuse: Refuse) -> Config:
    """Its key `rotary` has the base and the kind; without it, positions are dynamic NTK with a factor of 1."""
    rotary = config.get("rotary") or {"base": 10000, "type": "dynamic"}
    if not isinstance(rotary, dict) or rotary.get("type") not in ("origin", "dynamic"):
        refuse(f"rotary={rotary!r}")
    dynamic = rotary["type"] == "dynamic"
    scaling = {"rope_type": "dynamic", "factor": rotary.get("scaling_factor", 1.0)} if dynamic else None
    return {**config, "rope_theta": rotary.get("base", 10000), "rope_scaling": scaling}


def _qwen(config: Config, refuse: Refuse) -> Config:
    """Its dynamic NTK multiplies the base by 2^(k + 1) - 1 for lengths up to 2^k times the trained one: a factor of 2.

    `intermediate_size` counts gate and up together. The trained length, which logn attention goes by too, is
    `seq_length`.
    """
    if not config.get("no_bias", True):
        refuse("no_bias=False (biases in attention output and MLP)")
    if not config.get("scale_attn_weights", True):
        refuse("scale_attn_weights=False (attention without its scale)")
    inter = config.get("intermediate_size")
    if not isinstance(inter, int) or inter % 2:
        refuse(f"intermediate_size={inter!r}, which must be an even number: gate and up together")
    scaling = {"rope_type": "dynamic", "factor": 2.0} if config.get("use_dynamic_ntk", True) else None
    length = config.get("seq_length") or config.get("max_position_embeddings")
    return {
        **config,
        "intermediate_size": inter // 2,
        "max_position_embeddings": length,
        "rope_scaling": scaling,
        "use_logn_attn": bool(config.get("use_logn_attn", True)),
    }


def _baichuan(config: Config, refuse: Refuse) -> Config:
    """The 13B models, whose configurations have no max_position_embeddings, have ALiBi instead of rotary positions."""
    if "max_position_embeddings" not in config or config.get("hidden_size") == BAICHUAN_13B_WIDTH:
        refuse("ALiBi positions (Baichuan 13B)")
    if config.get("tie_word_embeddings"):
        refuse("tie_word_embeddings=True")
    return config


# Which layers of a Qwen have a window, if it is switched on: those from max_window_layers on.
_QWEN_WINDOW = {"use_sliding_window": False, "max_window_layers": 28}
_BAICHUAN_NAMES = TensorNames(qkv=("self_attn.W_pack",))

FAMILIES: Mapping[str, Family] = {
    # Llama 1, 2 and 3, CodeLlama, Vicuna, Yi, SOLAR, SmolLM2, DeepSeek-LLM and distillations into Llama.
    "LlamaForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias"),
    "MistralForCausalLM": Family(
        windowed=True, defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
    ),
    # DeepSeek-R1-Distill-Qwen too.
    "Qwen2ForCausalLM": Family(
        qkv_bias=True, windowed=True,
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, **_QWEN_WINDOW},
    ),
    "Qwen3ForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, windowed=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, **_QWEN_WINDOW},
    ),
    "InternLMForCausalLM": Family(qkv_bias="bias", o_bias="bias", defaults={"bias": True}, adapt=_internlm),
    "InternLM2ForCausalLM": Family(
        names=TensorNames(
            embedding="model.tok_embeddings.weight",
            attention_norm="attention_norm",
            qkv=("attention.wqkv",),
            kv_groups=True,
            wo="attention.wo",
            ffn_norm="ffn_norm",
            gate="feed_forward.w1",
            up="feed_forward.w3",
            down="feed_forward.w2",
            head="output.weight",
        ),
        qkv_bias="bias",
        o_bias="bias",
        defaults={"bias": True},
    ),
    # Its `bias` is of the attention's output and of the MLP, which has no place for one here.
    "InternLM3ForCausalLM": Family(
        keys={"mlp_bias": "bias"},
        qkv_bias="qkv_bias",
        o_bias="bias",
        defaults={"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768},
    ),
    "QWenLMHeadModel": Family(
        names=TensorNames(
            embedding="transformer.wte.weight",
            layer="transformer.h.{}",
            attention_norm="ln_1",
            qkv=("attn.c_attn",),
            wo="attn.c_proj",
            ffn_norm="ln_2",
            gate="mlp.w2",
            up="mlp.w1",
            down="mlp.c_proj",
            norm="transformer.ln_f.weight",
        ),
        keys={"rms_norm_eps": "layer_norm_epsilon", "rope_theta": "rotary_emb_base", "head_dim": "kv_channels"},
        defaults={"head_dim": 128},
        qkv_bias=True,
        adapt=_qwen,
    ),
    "BaiChuanForCausalLM": Family(names=_BAICHUAN_NAMES, adapt=_baichuan),
    "BaichuanForCausalLM": Family(
        names=_BAICHUAN_NAMES,
        normalised_head=lambda vocab_size: vocab_size != BAICHUAN_1_VOCAB,
        adapt=_baichuan,
    ),
}  # fmt: skip
ARCHITECTURES = tuple(FAMILIES)


@dataclass(frozen=True)
class Feature:
    """Something of a checkpoint that changes what is computed, which the decoder does not do: by the keys that ask.

    neutral: values with which a key asks for nothing, beside null, false, 0 and what is empty.
    """

    name: str
    keys: tuple[str, ...]
    neutral: tuple[Any, ...] = ()


# Keys of classes of the field, which find their way into configurations of the architectures above, by fine-tuning, by
# merging, or by renaming the class.
UNSUPPORTED = (
    Feature("multi-head latent attention (MLA)", ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim")),
    Feature(
        "a mixture of experts (MoE)",
        (
            "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok",
            "moe_intermediate_size", "n_shared_experts", "shared_expert_intermediate_size",
        ),
    ),
    Feature("ALiBi positions", ("alibi", "use_alibi", "alibi_bias_max")),
    Feature("positions that are not rotary", ("position_embedding_type",), ("rope", "rotary", "rope_gpt_neox")),
    Feature("attention sinks", ("attention_sinks", "use_attention_sinks", "attn_sinks", "num_sink_tokens")),
    Feature("softcapping of attention scores", ("attn_logit_softcapping",)),
    Feature("softcapping of logits", ("final_logit_softcapping", "output_softcap")),
    Feature("rotary embedding of a part of each head", ("partial_rotary_factor", "rotary_pct", "rotary_percent"), (1,)),
    Feature("interleaved rotary embedding", ("rope_interleave", "rotary_interleaved", "rope_interleaved")),
    Feature("layers without positions", ("no_rope_layers", "no_rope_layer_interval", "nope_layer_interval")),
    Feature("chunked attention", ("attention_chunk_size", "dual_chunk_attention_config")),
    Feature("temperatures of attention by position", ("attn_temperature_tuning", "attn_scale"), (1,)),
    Feature("normalised queries and keys", ("use_qk_norm", "qk_layernorm", "use_qk_layernorm", "clip_qkv")),
    Feature("a scale of its own for attention", ("attention_multiplier", "query_pre_attn_scalar")),
    Feature("scaled embeddings", ("embedding_multiplier", "scale_emb"), (1,)),
    Feature("scaled residuals", ("residual_multiplier", "scale_depth", "residual_scale"), (1,)),
    Feature("scaled logits", ("logits_scaling", "logit_scale", "dim_model_base"), (1,)),
    Feature("biases in the MLP", ("mlp_bias", "use_mlp_bias")),
    Feature("attention and MLP side by side", ("parallel_attn", "use_parallel_residual", "parallel_residual")),
    Feature("norms that subtract the mean", ("norm_type", "normalization_type"), ("rms_norm", "rmsnorm", "RMSNorm")),
    Feature("norms behind a layer's parts", ("post_norm", "use_post_norm", "apply_residual_connection_post_layernorm")),
    Feature("attention to later tokens", ("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention")),
    Feature(
        "images, sound or video",
        ("vision_config", "audio_config", "visual", "mm_vision_tower", "vision_tower", "mm_audio_tower"),
    ),
    Feature("adapters beside the weights", ("lora_rank", "adapter_rank")),
)  # fmt: skip


def names_of(architecture: str) -> TensorNames:
    """Of an architecture that is known, else Llama's."""
    return FAMILIES.get(architecture, FAMILIES["LlamaForCausalLM"]).names
