"""Tiny checkpoints with 4-bit weights, packed here by their definition: AutoAWQ's gemm layout and GPTQ's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_llama_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(8))
GROUP_SIZE = 32


class Levels(NamedTuple):
    """A weight in 4 bits before packing: levels [K, N], zeros [K // g, N], both 0 to 15, scales [K // g, N] fp16."""

    levels: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    def weight(self) -> torch.Tensor:
        """[N, K] in fp32."""
        group_size = self.levels.shape[0] // self.scales.shape[0]
        zeros, scales = (x.repeat_interleave(group_size, 0) for x in (self.zeros, self.scales.float()))
        return ((self.levels - zeros) * scales).t()


def pack(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Values [R, N] in words [R, N // 8]: bits 4 i hold column 8 c + order[i]."""
    columns = values.long().unflatten(1, (-1, 8))
    words = sum(columns[..., column] << 4 * place for place, column in enumerate(order))
    assert isinstance(words, torch.Tensor)
    return torch.where(words < 2**31, words, words - 2**32).int()


def random_levels(weight: torch.Tensor, group_size: int, *, symmetric: bool = False) -> Levels:
    """Levels with zeros and scales of the size of `weight` [N, K], its values forgotten."""
    out_features, in_features = weight.shape
    shape = (in_features // group_size, out_features)
    zeros = torch.full(shape, 8) if symmetric else torch.randint(0, 16, shape)
    scales = (torch.rand(shape) + 0.5) * (1.5 / in_features**0.5 / 5)
    return Levels(torch.randint(0, 16, (in_features, out_features)), zeros, scales.half())


def awq_tensors(module: str, levels: Levels) -> dict[str, torch.Tensor]:
    return {
        f"{module}.qweight": pack(levels.levels, AWQ_ORDER),
        f"{module}.qzeros": pack(levels.zeros, AWQ_ORDER),
        f"{module}.scales": levels.scales,
    }


def gptq_tensors(module: str, levels: Levels, *, zero_offset: int = 1) -> dict[str, torch.Tensor]:
    in_features, num_groups = levels.levels.shape[0], levels.scales.shape[0]
    return {
        f"{module}.qweight": pack(levels.levels.t(), IN_ORDER).t().contiguous(),
        f"{module}.qzeros": pack((levels.zeros - zero_offset) % 16, IN_ORDER),
        f"{module}.scales": levels.scales,
        f"{module}.g_idx": torch.arange(in_features, dtype=torch.int32) // (in_features // num_groups),
    }


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def make_quantized(
    path: Path,
    method: str,
    *,
    group_size: int = GROUP_SIZE,
    symmetric: bool = False,
    quantization_config: dict[str, Any] | None = None,
    zero_offset: int = 1,
    **checkpoint: Any,
) -> dict[str, torch.Tensor]:
    """Write a random checkpoint of `method` (awq or gptq) to `path`; returns the state of the model that it means.

    quantization_config: changes to the one in config.json; a value None removes a key.
    """
    make_llama_checkpoint(path, **{"dtype": torch.float16, **checkpoint})
    state: dict[str, torch.Tensor] = load_file(path / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in list(state.items()):
        if not is_linear(name):
            stored[name] = tensor
            continue
        module = name.removesuffix(".weight")
        levels = random_levels(tensor, group_size, symmetric=symmetric)
        state[name] = levels.weight()
        packed = (
            awq_tensors(module, levels) if method == "awq" else gptq_tensors(module, levels, zero_offset=zero_offset)
        )
        stored |= packed
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    given: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": group_size}
    given |= {"zero_point": True, "version": "gemm"} if method == "awq" else {"sym": symmetric, "desc_act": False}
    given |= quantization_config or {}
    config["quantization_config"] = {key: value for key, value in given.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return state
