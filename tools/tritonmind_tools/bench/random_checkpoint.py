"""A random-weight Llama checkpoint of a known model's shape, for measurements where real weights cannot be had.

`python -m tritonmind_tools.bench.random_checkpoint llama-2-7b DIRECTORY` writes safetensors, config.json and a
byte-level tokenizer, as `tritonmind convert` reads them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tritonmind_tools.bench.shapes import SHAPES, Shape

WEIGHT_STD = 0.02  # as Llama initialises


def write(shape: Shape, directory: Path) -> None:
    """Write the checkpoint in fp16, one safetensors file a layer."""
    directory.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}

    def save(file: str, sizes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for name, size in sizes.items():
            value = torch.randn(size, generator=generator, device=device) * WEIGHT_STD
            tensors[name] = (1 + value if len(size) == 1 else value).half().cpu()
            weight_map[name] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})

    hidden, inter = shape.hidden_size, shape.intermediate_size
    kv_size = shape.head_dim * shape.num_kv_heads
    save(
        "common.safetensors",
        {
            "model.embed_tokens.weight": (shape.vocab_size, hidden),
            "lm_head.weight": (shape.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        },
    )
    for layer in range(shape.num_layers):
        sizes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inter, hidden),
            "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter),
        }
        prefix = f"model.layers.{layer}"
        save(f"layer-{layer:03}.safetensors", {f"{prefix}.{name}.weight": size for name, size in sizes.items()})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2))
    _write_tokenizer(directory)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _write_tokenizer(directory: Path) -> None:
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    write(SHAPES[args.shape], args.directory)


if __name__ == "__main__":
    main()
