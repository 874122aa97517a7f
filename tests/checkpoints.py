"""Tiny Hugging Face Llama checkpoints with random weights and a real tokenizer, written by Transformers itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = (
    "The capital of France is Paris. The capital of Italy is Rome.",
    "Größe, naïve, 你好,世界, 😀 and 1 + 1 = 2.",
    "A token stream ends where the model says so.",
)

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_tokenizer(path: Path, *, vocab: int) -> None:
    """Write a byte-level BPE tokenizer of at most `vocab` tokens with a ChatML template: any text round-trips."""
    assert vocab >= MIN_VOCAB, f"a byte-level vocabulary needs at least {MIN_VOCAB} entries"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)


def make_llama_checkpoint(
    path: Path | str,
    *,
    seed: int = 0,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    num_layers: int = 2,
    hidden: int = 64,
    intermediate: int = 96,
    vocab: int = 320,
    max_position_embeddings: int = 512,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    tie: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    norm_eps: float = 1e-5,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    eos_token_id: int | list[int] = 2,
    safe_serialization: bool = True,
    config_overrides: dict[str, Any] | None = None,
) -> LlamaForCausalLM:
    """Write a random LlamaForCausalLM to `path` and return it (in `dtype`, on the CPU, in eval mode).

    Every weight is random, norms and biases included, so that no two of them can be mistaken for each other. The same
    arguments give the same bytes. `rope_scaling` is a dictionary with `rope_type` and its factors, without rope_theta.
    `shards` is the least number of safetensors files. Without `safe_serialization` a pickle checkpoint is written.
    """
    path = Path(path)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=norm_eps,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", **(rope_scaling or {}), "rope_theta": rope_theta},
        bos_token_id=1,
        eos_token_id=eos_token_id,
        dtype=dtype,
        **(config_overrides or {}),
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                value = 1 + 0.3 * noise
            elif parameter.dim() == 1:
                value = 0.3 * noise
            else:
                value = noise * (1.5 / math.sqrt(parameter.shape[1]))
            # Not model.to(dtype): that would round the rotary frequencies too, which from_pretrained keeps in fp32.
            parameter.data = value.to(dtype)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    if safe_serialization:
        limit = total + 1 if shards == 1 else max(largest, total // shards)
        model.save_pretrained(path, max_shard_size=limit)
    else:
        path.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(path)
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    make_tokenizer(path, vocab=vocab)
    return model
