"""Fills a model from a workspace's tensors. Every tensor must find its place and every place its tensor."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from tritonmind.config import ModelConfig
from tritonmind.layers.linear import Product
from tritonmind.models.llama import LlamaForCausalLM
from tritonmind.models.registry import model_class
from tritonmind.models.weight_stream import WeightStream

logger = logging.getLogger(__name__)

_LAYER_TENSOR = re.compile(r"layers\.(\d+)\.(.+)")
# Tensor name within a layer, rank taken out, to the module and the part of its tensor.
_LAYER_MODULES = {
    "attention_norm": ("attention_norm", 0),
    "attention.w_qkv": ("w_qkv", 0),
    "attention.q_norm": ("attention.q_norm", 0),
    "attention.k_norm": ("attention.k_norm", 0),
    "attention.wo": ("wo", 0),
    "ffn_norm": ("ffn_norm", 0),
    "feed_forward.w1": ("w13", 0),
    "feed_forward.w3": ("w13", 1),
    "feed_forward.w2": ("w2", 0),
}


def load_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    lm_head_int8: bool = False,
) -> LlamaForCausalLM:
    """Build the decoder of `config` on `device` and fill it from (workspace name, tensor) pairs of one rank.

    The workspace has checked names, shapes and types against its layout; what is left over or missing here is our bug.
    """
    started = time.monotonic()
    model = model_class(config.architecture)(
        config, max_model_len=max_model_len, dtype=dtype, device=device, lm_head_int8=lm_head_int8
    )
    unfilled = {place.data_ptr() for place in _places(model)}
    with WeightStream(device) as stream:
        for name, tensor in tensors:
            place = _place(model, name)
            assert place.data_ptr() in unfilled, f"{name} has no place in {config.architecture}, or came twice"
            unfilled.remove(place.data_ptr())
            stream.copy(place, tensor)
    assert not unfilled, f"{len(unfilled)} tensors of {config.architecture} were not in the workspace"
    model.finalize()
    seconds = time.monotonic() - started
    logger.info(
        "weights: %.2f GB in %.1f s (%.2f GB/s)", stream.num_bytes / 1e9, seconds, stream.num_bytes / 1e9 / seconds
    )
    return model.eval()


def _places(model: LlamaForCausalLM) -> Iterator[torch.Tensor]:
    """Where tensors go; one that modules share comes as often."""
    for name in model.state_dict():
        owner, _, kind = name.rpartition(".")
        yield from _parts(model.get_submodule(owner), kind)


def _parts(module: nn.Module, kind: str) -> list[torch.Tensor]:
    """A module's tensor as the workspace's tensors that it holds."""
    return module.parts(kind) if isinstance(module, Product) else [getattr(module, kind)]


def _place(model: LlamaForCausalLM, name: str) -> torch.Tensor:
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None:
        module, kind = {
            "tok_embeddings.weight": (model, "tok_embeddings"),
            "norm.weight": (model.norm, "weight"),
            "output.weight": (model.output, "weight"),
        }[name]
        return _parts(module, kind)[0]
    # "attention.w_qkv.0.weight" -> "attention.w_qkv", "weight"; norms carry no rank.
    *path, kind = match.group(2).split(".")
    if path[-1].isdigit():
        path.pop()
    module_name, number = _LAYER_MODULES[".".join(path)]
    module = model.layers[int(match.group(1))].get_submodule(module_name)
    return _parts(module, kind)[number]
