"""Fills a model from a workspace's tensors. Every tensor must find its place and every place its tensor."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator

import torch

from tritonmind.config import ModelConfig
from tritonmind.layers.linear import Linear
from tritonmind.models.llama import LlamaForCausalLM
from tritonmind.models.registry import model_class
from tritonmind.models.weight_stream import WeightStream

logger = logging.getLogger(__name__)

_LAYER_TENSOR = re.compile(r"layers\.(\d+)\.(.+)")
# Tensor name within a layer, rank taken out, to the module and, where several tensors share one, the part of it.
_LAYER_MODULES = {
    "attention_norm": ("attention_norm", None),
    "attention.w_qkv": ("w_qkv", None),
    "attention.wo": ("wo", None),
    "ffn_norm": ("ffn_norm", None),
    "feed_forward.w1": ("w13", 0),
    "feed_forward.w3": ("w13", 1),
    "feed_forward.w2": ("w2", None),
}


def load_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LlamaForCausalLM:
    """Build the decoder of `config` on `device` and fill it from (workspace name, tensor) pairs of one rank.

    The workspace has checked names, shapes and types against its layout; what is left over or missing here is our bug.
    """
    started = time.monotonic()
    model = model_class(config.architecture)(config, max_model_len=max_model_len, dtype=dtype, device=device)
    unfilled = set(_parts(model))
    with WeightStream(device) as stream:
        for name, tensor in tensors:
            target, part = _target(model, name)
            key = (target.data_ptr(), part)
            assert key in unfilled, f"{name} has no place in {config.architecture}, or came twice"
            unfilled.remove(key)
            stream.copy(_part(target, part), tensor)
    assert not unfilled, f"{len(unfilled)} tensors of {config.architecture} were not in the workspace"
    model.finalize()
    seconds = time.monotonic() - started
    logger.info(
        "weights: %.2f GB in %.1f s (%.2f GB/s)", stream.num_bytes / 1e9, seconds, stream.num_bytes / 1e9 / seconds
    )
    return model.eval()


def _parts(model: LlamaForCausalLM) -> Iterator[tuple[int, int | None]]:
    fused = {_weight(layer.w13).data_ptr() for layer in model.layers}  # type: ignore[arg-type]
    for tensor in model.state_dict().values():
        if tensor.data_ptr() in fused:
            yield from ((tensor.data_ptr(), part) for part in (0, 1))
        else:
            yield tensor.data_ptr(), None


def _part(target: torch.Tensor, part: int | None) -> torch.Tensor:
    return target if part is None else target.chunk(2)[part]


def _weight(linear: Linear) -> torch.Tensor:
    assert linear.weight is not None
    return linear.weight


def _target(model: LlamaForCausalLM, name: str) -> tuple[torch.Tensor, int | None]:
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None:
        top_level = {"tok_embeddings.weight": model.tok_embeddings, "norm.weight": model.norm.weight}
        return (_weight(model.output) if name == "output.weight" else top_level[name]), None
    # "attention.w_qkv.0.weight" -> "attention.w_qkv", "weight"; norms carry no rank.
    *path, kind = match.group(2).split(".")
    if path[-1].isdigit():
        path.pop()
    module_name, part = _LAYER_MODULES[".".join(path)]
    module = getattr(model.layers[int(match.group(1))], module_name)
    return getattr(module, kind), part
