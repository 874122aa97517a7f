"""Running statistics of a layer's linear inputs and of its K and V, per channel."""

from __future__ import annotations

import torch

from tritonmind.config import ModelConfig
from tritonmind.errors import CheckpointError
from tritonmind_tools.lite.decoder_layer import KEY, LINEAR_INPUTS, QKV, VALUE, W1, W2, WO

MIN, MAX, ABSMAX, MEAN, ABSMEAN = KINDS = ("min", "max", "absmax", "mean", "absmean")


def statistic_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The channels of each thing that is measured in a layer. K and V have them by head."""
    per_head = (model.num_kv_heads, model.head_dim)
    return {
        QKV: (model.hidden_size,),
        WO: (model.num_heads * model.head_dim,),
        W1: (model.hidden_size,),
        W2: (model.intermediate_size,),
        KEY: per_head,
        VALUE: per_head,
    }


class ChannelStatistics:
    """Min, max, absmax, mean and absmean of each channel over all tokens; sums are fp64."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._min = torch.full(shape, float("inf"), device=device)
        self._max = torch.full(shape, float("-inf"), device=device)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._abs_sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._num_tokens = 0

    def update(self, value: torch.Tensor) -> None:
        """Add the tokens of value [T, *shape]."""
        self._min = torch.minimum(self._min, value.amin(0))
        self._max = torch.maximum(self._max, value.amax(0))
        self._sum += value.sum(0)
        self._abs_sum += value.abs().sum(0)
        self._num_tokens += value.shape[0]

    def finite(self) -> bool:
        """Whether no value was NaN or infinite: each of those stays in minimum or maximum."""
        return bool(torch.isfinite(self._min).all() and torch.isfinite(self._max).all())

    def results(self) -> dict[str, torch.Tensor]:
        """The statistics by KINDS, fp32 on the CPU."""
        results = {
            MIN: self._min,
            MAX: self._max,
            ABSMAX: torch.maximum(self._min.abs(), self._max.abs()),
            MEAN: self._sum / self._num_tokens,
            ABSMEAN: self._abs_sum / self._num_tokens,
        }
        return {kind: tensor.float().cpu() for kind, tensor in results.items()}


class LayerStatistics:
    """All statistics of decoder layer `number`; `observe` is what DecoderLayer.forward calls."""

    def __init__(self, model: ModelConfig, number: int, device: torch.device) -> None:
        self._number = number
        shapes = statistic_shapes(model)
        self._channels = {name: ChannelStatistics(shape, device) for name, shape in shapes.items()}

    def observe(self, name: str, value: torch.Tensor) -> None:
        """Raises CheckpointError naming layer and tensor when a value is NaN or infinite."""
        channels = self._channels[name]
        channels.update(value)
        if not channels.finite():
            what = name if name in (KEY, VALUE) else f"the input of {name}"
            raise CheckpointError(
                f"layer {self._number}: {what} holds NaN or infinite values: the checkpoint's weights are damaged, "
                "or its activations do not fit fp32"
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """By statistic_name."""
        return {
            statistic_name(self._number, name, kind): tensor
            for name, channels in self._channels.items()
            for kind, tensor in channels.results().items()
        }


def statistic_name(number: int, name: str, kind: str) -> str:
    """The name under which a statistic is stored: layers.3.attention.wo.absmax."""
    assert name in (*LINEAR_INPUTS, KEY, VALUE) and kind in KINDS
    return f"layers.{number}.{name}.{kind}"
