"""A Llama checkpoint as Meta writes them, from one in Hugging Face's form: the way back, shards and all."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_SHARED_COLUMNS = ("tok_embeddings.weight", "attention.wo.weight", "feed_forward.w2.weight")


def write_meta_checkpoint(path: Path, model: LlamaForCausalLM, *, ranks: int, rope_theta: float | None = None) -> None:
    """Write params.json and consolidated.NN.pth for `ranks` model-parallel ranks; the tokenizer is the caller's."""
    config = model.config
    path.mkdir(parents=True, exist_ok=True)
    params = {
        "dim": config.hidden_size,
        "multiple_of": 32,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
        **({"rope_theta": rope_theta} if rope_theta else {}),
    }
    (path / "params.json").write_text(json.dumps(params))
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in model.state_dict().items():
        original = name.replace("model.layers.", "layers.")
        for theirs, metas in _NAMES.items():
            original = original.replace(theirs, metas)
        if ".wq." in original or ".wk." in original:
            # Half j of a head to pair j: row (half, j) becomes row (j, half).
            rows, columns = tensor.shape
            tensor = tensor.view(-1, 2, config.head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)
        if tensor.dim() == 1:
            parts = [tensor] * ranks
        else:
            parts = list(tensor.chunk(ranks, 1 if original.endswith(_SHARED_COLUMNS) else 0))
        for shard, part in zip(shards, parts, strict=True):
            shard[original] = part.clone()
    for rank, shard in enumerate(shards):
        shard["rope.freqs"] = torch.arange(4.0)
        torch.save(shard, path / f"consolidated.{rank:02d}.pth")
