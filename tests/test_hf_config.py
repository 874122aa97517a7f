"""config.json of well-known models, cut to the keys that say something, as we read them."""

from __future__ import annotations

import json
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
# Models that differ from one of these in what their configurations say.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vicuna-7b-v1.5-16k": (
        "Llama-3.1-8B", {"rope_theta": 10000.0, "rope_scaling": {"factor": 4.0, "type": "linear"}}, {"rope_theta": 1e4},
    ),
    "SmolLM2-1.7B": (
        "Llama-3.1-8B",
        {"rope_interleaved": False, "is_llama_config": True, "rope_scaling": None, "tie_word_embeddings": True},
        {"rope_scaling": None, "tie_word_embeddings": True},
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        "Qwen2.5-7B",
        {"use_mrope": False, "sliding_window": 4096, "rope_scaling": None, "rope_theta": 10000},
        {"sliding_window": 0, "rope_theta": 1e4, "rope_scaling": None},
    ),
    "internlm-20b": (
        "internlm-chat-7b",
        {"bias": False, "num_key_value_heads": 32, "rotary": {"base": 10000, "type": "dynamic"}},
        {"qkv_bias": False, "o_bias": False},
    ),
    "internlm3-8b-instruct": (
        "internlm2-chat-7b",
        {"architectures": ["InternLM3ForCausalLM"], "qkv_bias": False, "head_dim": 128, "num_key_value_heads": 2,
         "rope_theta": 50000000, "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}},
        {"num_kv_heads": 2, "head_dim": 128, "rope_theta": 5e7},
    ),
    "Qwen-72B-Chat": (
        "Qwen-7B-Chat",
        {"seq_length": 32768, "rotary_emb_base": 1000000, "use_dynamic_ntk": False, "use_logn_attn": False},
        {"max_position_embeddings": 32768, "rope_theta": 1e6, "rope_scaling": None, "use_logn_attn": False},
    ),
}  # fmt: skip
MODELS |= {name: (MODELS[base][0] | changes, expected) for name, (base, changes, expected) in VARIANTS.items()}


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
        "vicuna-7b-v1.5-16k": ("linear", 4.0),
        "internlm-20b": ("dynamic", 1.0),
        "internlm3-8b-instruct": ("dynamic", 6.0),
    }
    yarn = kinds["Qwen2.5-7B"]
    assert yarn is not None and yarn.attention_factor == pytest.approx(1.138629436)


def test_baichuan_13b_has_alibi() -> None:
    config = MODELS["Baichuan2-7B-Chat"][0]
    without = {key: value for key, value in config.items() if key != "max_position_embeddings"}
    with pytest.raises(CheckpointError, match=r"config\.json: ALiBi positions \(Baichuan 13B\) is not supported"):
        read({**without, "hidden_size": 5120, "num_attention_heads": 40})


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "vicuna-7b-v1.5-16k", "Mistral-7B-v0.1", "Qwen2.5-7B", "Qwen3-0.6B"])
def test_as_transformers_5_writes_it(name: str) -> None:
    """With rope_parameters, layer_types and defaults written out, it means the same."""
    from transformers import AutoConfig

    config = MODELS[name][0]
    model_type = config["architectures"][0].removesuffix("ForCausalLM").lower()
    written = json.loads(AutoConfig.for_model(model_type, **config).to_json_string())
    assert "rope_parameters" in written and read(written) == read(config)


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("Qwen2.5-7B", {"use_sliding_window": None}, 0),
        ("Qwen2.5-7B", {"use_sliding_window": True, "max_window_layers": None}, 0),
        ("Qwen2.5-7B", {"use_sliding_window": True, "max_window_layers": 0}, 131072),
        ("Qwen2.5-7B", {"layer_types": ["sliding_attention"] * 28}, 0),
        ("Mistral-7B-v0.1", {"use_sliding_window": False, "max_window_layers": 28}, 4096),
    ],
)
def test_qwens_window_is_switched_on_by_a_key_of_its_own(name: str, changes: dict[str, Any], window: int) -> None:
    """None leaves a key out. Defaults are off, and from layer 28 on."""
    config = {key: value for key, value in (MODELS[name][0] | changes).items() if value is not None}
    assert read(config).sliding_window == window


def test_where_the_length_before_a_scaling_stands() -> None:
    """Beside the scaling it comes first, as with Transformers."""
    config = MODELS["Qwen2.5-7B"][0] | {"original_max_position_embeddings": 16384}
    scaling = read(config).rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == 16384


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        (
            "Qwen2.5-7B",
            {"dual_chunk_attention_config": {"chunk_size": 262144}},
            "dual_chunk_attention_config={'chunk_size': 262144} asks for chunked attention, which is not supported",
        ),
        (
            "Qwen3-0.6B",
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
            "rope_scaling={'rope_type': 'yarn', 'factor': 4.0} stands beside rope_parameters: put it into that",
        ),
        ("internlm-chat-7b", {"rotary": "origin"}, "rotary='origin' is not supported"),
    ],
)
def test_what_is_refused(name: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read(MODELS[name][0] | changes)
    assert str(error.value) == f"config.json: {problem}"
