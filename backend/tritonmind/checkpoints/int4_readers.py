"""Readers that give 4-bit weights in the portable AWQ form, out of GPTQ's layout or out of weights in a float type.

A reader is asked as a checkpoint is, for a part of a tensor by its name and place in the portable form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from tritonmind.checkpoints.plan import has_bias, linear_layers, max_parts
from tritonmind.checkpoints.source import Checkpoint, Quantization
from tritonmind.config import INT4_PER_WORD, ModelConfig
from tritonmind.errors import CheckpointError
from tritonmind.kernels.awq_format import MAX_LEVEL, AwqWeight, pack_nibbles, quantize

Reader = Callable[[str, int, int, int], torch.Tensor]
# Rounded together: what fits a CPU's cache is rounded three times as fast.
_ROUNDED_ROWS = 512


def reader(checkpoint: Checkpoint, model: ModelConfig) -> Reader:
    """What reads tensors of an int4 model. Raises CheckpointError for an order of groups that it has no place for."""
    quantization = checkpoint.quantization
    if quantization is None:
        return rounding_reader(checkpoint, model.group_size, remembered=max_parts(model))
    if quantization.method == "gptq":
        _check_gptq(checkpoint, model, quantization)
        return gptq_reader(checkpoint, quantization)
    return checkpoint.read


def gptq_reader(checkpoint: Checkpoint, quantization: Quantization) -> Reader:
    """Repacks GPTQ's words. The levels and the scales stay what they are, bit for bit."""

    def read(name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        if name.endswith(".qweight"):
            if dim == 0:
                words = checkpoint.read(name, 0, start // INT4_PER_WORD, stop // INT4_PER_WORD)
            else:
                words = checkpoint.read(name, 1, start * INT4_PER_WORD, stop * INT4_PER_WORD)
            return pack_nibbles(_nibbles_in_order(words, 0))
        tensor = checkpoint.read(name, dim, start, stop)
        if name.endswith(".qzeros"):
            # What is stored wraps around like what the packer subtracted from.
            return pack_nibbles(_nibbles_in_order(tensor, 1) + quantization.zero_offset & MAX_LEVEL)
        return tensor

    return read


def rounding_reader(checkpoint: Checkpoint, group_size: int, *, remembered: int) -> Reader:
    """Quantises weights while they are read: each to the nearest level of its group.

    remembered: parts of one tensor, at most, which are read kind by kind.
    """
    # How many of the weight's inputs and outputs one step along each dimension stands for.
    units = {
        "qweight": (1, INT4_PER_WORD),
        "qzeros": (group_size, INT4_PER_WORD),
        "scales": (group_size, 1),
    }

    @lru_cache(maxsize=remembered)
    def quantized(module: str, dim: int, start: int, stop: int) -> AwqWeight:
        name = f"{module}.weight"
        try:
            blocks = checkpoint.read(name, dim, start, stop).split(_ROUNDED_ROWS)
            parts = [quantize(block, group_size) for block in blocks]
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.tensors[name].file}: tensor {name}: {error}") from None
        return AwqWeight(*(torch.cat(kind, 1) for kind in zip(*parts, strict=True)))

    def read(name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        module, _, kind = name.rpartition(".")
        if kind not in units:
            return checkpoint.read(name, dim, start, stop)
        unit = units[kind][dim]
        tensor: torch.Tensor = getattr(quantized(module, 1 - dim, start * unit, stop * unit), kind)
        return tensor

    return read


def _nibbles_in_order(words: torch.Tensor, dim: int) -> torch.Tensor:
    """The 4-bit values of int32 words, of which eight take the place of one along `dim`, as uint8."""
    shape = list(words.shape)
    shape.insert(dim + 1, INT4_PER_WORD)
    values = torch.empty(shape, dtype=torch.uint8)
    for place in range(INT4_PER_WORD):
        values.select(dim + 1, place).copy_(words >> 4 * place & MAX_LEVEL)
    return values.flatten(dim, dim + 1)


def _check_gptq(checkpoint: Checkpoint, model: ModelConfig, quantization: Quantization) -> None:
    """Groups must be runs of inputs, and a bias that the model has no place for must be zero, as AutoGPTQ adds it."""
    remedy = "act-order (desc_act) is not supported: quantise the model with desc_act=False"
    for module, (_, in_features) in linear_layers(model).items():
        g_idx, bias = f"{module}.g_idx", f"{module}.bias"
        if g_idx in checkpoint.tensors:
            groups = torch.arange(in_features, dtype=torch.int32) // model.group_size
            found = checkpoint.tensors[g_idx]
            if found.shape != (in_features,) or not checkpoint.read(g_idx, 0, 0, in_features).int().equal(groups):
                raise CheckpointError(f"{found.file}: tensor {g_idx} puts inputs into groups out of order: {remedy}")
        elif quantization.desc_act:
            raise CheckpointError(f"{checkpoint.path}: tensor {g_idx} is missing, and {remedy}")
        if bias in checkpoint.tensors and not has_bias(model, module):
            found = checkpoint.tensors[bias]
            if checkpoint.read(bias, 0, 0, found.shape[0]).any():
                raise CheckpointError(
                    f"{found.file}: tensor {bias} is not zero, and {model.architecture} as config.json has it has none"
                )
