"""config.json of well-known models, cut to the keys that say something, as we read them."""

from __future__ import annotations

from typing import Any

import pytest

from tritonmind.checkpoints.hf_config import model_config_from_hf
from tritonmind.config import ModelConfig
from tritonmind.errors import CheckpointError

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama-3.1-8B": (
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 131072, "rope_theta": 500000.0, "pretraining_tp": 1, "mlp_bias": False,
         "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                          "original_max_position_embeddings": 8192}},
        {"head_dim": 128, "num_kv_heads": 8, "rope_theta": 5e5},
    ),
    "Mistral-7B-v0.1": (
        {"architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
         "max_position_embeddings": 32768, "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
        {"sliding_window": 4096, "head_dim": 128},
    ),
    "Mistral-Nemo": (
        {"architectures": ["MistralForCausalLM"], "hidden_size": 5120, "intermediate_size": 14336, "head_dim": 128,
         "vocab_size": 131072, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
         "sliding_window": None, "max_position_embeddings": 131072, "rope_theta": 1000000.0},
        {"sliding_window": 0, "head_dim": 128, "hidden_size": 5120},
    ),
    "Qwen2.5-7B": (
        {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064,
         "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "use_sliding_window": False,
         "sliding_window": 131072, "max_window_layers": 28, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
         "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
        {"qkv_bias": True, "o_bias": False, "sliding_window": 0, "head_dim": 128},
    ),
    "Qwen3-0.6B": (
        {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 151936,
         "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
         "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
         "max_position_embeddings": 40960, "rope_theta": 1000000, "tie_word_embeddings": True, "rope_scaling": None},
        {"qk_norm": True, "qkv_bias": False, "tie_word_embeddings": True, "head_dim": 128},
    ),
    "internlm-chat-7b": (
        {"architectures": ["InternLMForCausalLM"], "bias": True, "hidden_size": 4096, "intermediate_size": 11008,
         "vocab_size": 103168, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
         "rms_norm_eps": 1e-6},
        {"qkv_bias": True, "o_bias": True, "num_kv_heads": 32},
    ),
    "internlm2-chat-7b": (
        {"architectures": ["InternLM2ForCausalLM"], "bias": False, "hidden_size": 4096, "intermediate_size": 14336,
         "vocab_size": 92544, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "max_position_embeddings": 32768, "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0},
         "attn_implementation": "eager", "pretraining_tp": 1},
        {"qkv_bias": False, "num_kv_heads": 8, "rope_theta": 1e6},
    ),
    "Qwen-7B-Chat": (
        {"architectures": ["QWenLMHeadModel"], "hidden_size": 4096, "intermediate_size": 22016, "vocab_size": 151936,
         "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128, "layer_norm_epsilon": 1e-6,
         "seq_length": 8192, "max_position_embeddings": 32768, "rotary_emb_base": 10000, "rotary_pct": 1.0,
         "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True, "scale_attn_weights": True},
        {"qkv_bias": True, "o_bias": False, "intermediate_size": 11008, "max_position_embeddings": 8192,
         "use_logn_attn": True, "head_dim": 128},
    ),
    "Baichuan2-7B-Chat": (
        {"architectures": ["BaichuanForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
         "vocab_size": 125696, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
         "model_max_length": 4096, "z_loss_weight": 0, "rms_norm_eps": 1e-6},
        {"qkv_bias": False, "num_kv_heads": 32, "rope_scaling": None},
    ),
}  # fmt: skip


def read(config: dict[str, Any]) -> ModelConfig:
    return model_config_from_hf(
        config, "config.json", model_name="a", weight_type="fp16", bos_token_id=1, eos_token_ids=(2,)
    )


@pytest.mark.parametrize("name", MODELS)
def test_well_known_models(name: str) -> None:
    config, expected = MODELS[name]
    model = read(config)
    assert {key: getattr(model, key) for key in expected} == expected


def test_what_scalings_are_resolved_to() -> None:
    """Qwen's dynamic NTK has a factor of 2, InternLM's one of 1; YaRN's attention factor is 0.1 ln(factor) + 1."""
    kinds = {name: read(config).rope_scaling for name, (config, _) in MODELS.items()}
    found = {name: (scaling.rope_type, scaling.factor) for name, scaling in kinds.items() if scaling is not None}
    assert found == {
        "Llama-3.1-8B": ("llama3", 8.0),
        "Qwen2.5-7B": ("yarn", 4.0),
        "internlm-chat-7b": ("dynamic", 1.0),
        "internlm2-chat-7b": ("dynamic", 2.0),
        "Qwen-7B-Chat": ("dynamic", 2.0),
    }
    yarn = kinds["Qwen2.5-7B"]
    assert yarn is not None and yarn.attention_factor == pytest.approx(1.138629436)


def test_baichuan_13b_has_alibi() -> None:
    config = MODELS["Baichuan2-7B-Chat"][0]
    without = {key: value for key, value in config.items() if key != "max_position_embeddings"}
    with pytest.raises(CheckpointError, match=r"config\.json: ALiBi positions \(Baichuan 13B\) is not supported"):
        read({**without, "hidden_size": 5120, "num_attention_heads": 40})
