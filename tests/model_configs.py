"""Facts of well-known models, for tests that count their bytes."""

from tritonmind.config import ModelConfig

LLAMA_2_7B = ModelConfig(
    architecture="LlamaForCausalLM",
    model_name="llama2",
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=4096,
    weight_type="fp16",
    bos_token_id=1,
    eos_token_ids=(2,),
)
