"""Random-weight Llama files of a known model's shape, for measurements where real weights cannot be had.

`python -m tritonmind_tools.bench.random_checkpoint llama2-7b DIRECTORY` writes safetensors, config.json and a
byte-level tokenizer, as `tritonmind convert` reads them; with `--workspace`, in one pass, what the server serves. The
weights are those of the model `random:llama2-7b`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tritonmind.config import ModelConfig
from tritonmind.errors import TritonmindError
from tritonmind.random_model import SHAPES, RandomModel, known_shape
from tritonmind.workspace_writer import WorkspaceWriter

# A layer's tensor, without rank and kind, and its names in a checkpoint of Transformers.
LAYER_NAMES = {
    "attention_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    "attention.w_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.wo": ("self_attn.o_proj",),
    "feed_forward.w1": ("mlp.gate_proj",),
    "feed_forward.w3": ("mlp.up_proj",),
    "feed_forward.w2": ("mlp.down_proj",),
}
TOP_LEVEL_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def write_workspace(name: str, destination: Path, *, durable: bool = True) -> None:
    """Write the workspace of a RandomModel. Raises WorkspaceError for a bad destination.

    durable: see WorkspaceWriter.commit.
    """
    source = RandomModel(name)
    model = source.model
    config = hf_config(model)
    with WorkspaceWriter(destination, model, session_len=model.max_position_embeddings, source_config=config) as writer:
        _write_tokenizer(writer.tokenizer_dir, model.vocab_size)
        for name, tensor in _on_host(source):
            writer.write(name, tensor)
        writer.commit(durable=durable)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # an engine may be next on this card


def _on_host(source: RandomModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `source` on the CPU, each until the next is asked for: those of a card share pinned memory."""
    pinned = torch.empty(0, dtype=torch.uint8)
    for name, tensor in source.tensors(rank=0):
        if not tensor.is_cuda:
            yield name, tensor
            continue
        if pinned.numel() < tensor.nbytes:
            pinned = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        yield name, pinned[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def write(shape_name: str, directory: Path) -> None:
    """Write the checkpoint in fp16, one safetensors file a layer and one of what comes before them."""
    directory.mkdir(parents=True)
    source = RandomModel(shape_name)
    weight_map: dict[str, str] = {}
    for file, group in itertools.groupby(hf_tensors(source), key=lambda named: _file(named[0])):
        tensors = {name: tensor.cpu().contiguous() for name, tensor in group}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(hf_config(source.model), indent=2))
    _write_tokenizer(directory, source.model.vocab_size)


def _file(name: str) -> str:
    """Norms and what belongs to no layer come first, and the layers one after another."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(self_attn|mlp)\..+", name)
    return f"layer-{int(match[1]):03}.safetensors" if match else "common.safetensors"


def hf_tensors(source: RandomModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `source` under the names that a checkpoint of Transformers has for them."""
    model = source.model
    kv_size = model.num_kv_heads * model.head_dim
    for name, tensor in source.tensors(rank=0):
        if name in TOP_LEVEL_NAMES:
            yield TOP_LEVEL_NAMES[name], tensor
            continue
        _, number, *path, kind = name.split(".")
        hf_names = LAYER_NAMES[".".join(part for part in path if not part.isdigit())]
        sizes = (tensor.shape[0] - 2 * kv_size, kv_size, kv_size) if len(hf_names) == 3 else (tensor.shape[0],)
        for hf_name, part in zip(hf_names, tensor.split(sizes), strict=True):
            yield f"model.layers.{number}.{hf_name}.{kind}", part


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """What a checkpoint's config.json says of `model`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": "float16",
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_ids[0],
    }


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every id has a text, a number after a space: a server that streams text has nothing to send for one without.
    tokens += [f"Ġ{number}" for number in range(len(tokens), vocab_size)]
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
    parser.add_argument("shape", type=known_shape, choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--workspace", action="store_true", help="what the server serves, not what convert reads")
    args = parser.parse_args()
    try:
        (write_workspace if args.workspace else write)(args.shape, args.directory)
    except TritonmindError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
