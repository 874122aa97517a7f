"""Models of known shapes with random weights, made while loading: for measurements, where no files can be had.

`random:llama2-7b` is one, and `random:llama2-7b:int4` one with 4-bit weights, in the portable AWQ form.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from tritonmind.config import GROUP_SIZES, EngineConfig, FloatType, ModelConfig
from tritonmind.config_ini import build_engine_config, new_settings
from tritonmind.errors import ConfigError, WorkspaceError
from tritonmind.tensor_layout import common_tensor_specs, tensor_specs

if TYPE_CHECKING:
    import torch

PREFIX = "random:"
AUTO = "auto"
INT4 = "int4"
KV_RANGE = 16.0
WEIGHT_STD = 0.02  # as Llama initialises

_TENSOR_PARALLEL_SIZE = 1
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "I32": "int32"}
# Levels 0 to 15, each as likely, less zero points of 7 and 8 in turn, have a mean of 0 and this standard deviation.
_ZERO_POINTS = 0x78787878
_LEVELS_STD = (85 / 4 + 1 / 4) ** 0.5


class Shape(NamedTuple):
    """Sizes of a Llama model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def group_size(self) -> int:
        """Of 4-bit weights: the largest that divides what the linear layers read."""
        return max(size for size in GROUP_SIZES if not (self.hidden_size % size or self.intermediate_size % size))

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


SHAPES = {
    "llama2-7b": Shape(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama2-13b": Shape(5120, 13824, 40, 40, 40, 32000, 4096),
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, 128256, 8192),
    # No known model: enough layers and heads that a test on a card works it as it would a large one.
    "llama-150m": Shape(768, 2048, 16, 12, 4, 32000, 4096),
    # For trying a command out, on a CPU too.
    "tiny": Shape(64, 96, 2, 4, 2, 320, 512),
}


def known_shape(name: str) -> str:
    """The known shape that is spelt so, hyphens apart (llama-2-7b is llama2-7b), else `name` as it is."""
    return {known.replace("-", ""): known for known in SHAPES}.get(name.replace("-", ""), name)


class RandomModel:
    """A model of a known shape, read like a Workspace. The same name and type give the same weights on one device.

    weight_type: auto is fp16; of a model whose name says int4, of what is not in 4 bits. Raises ConfigError for an
    unknown shape or a type that weights cannot be drawn in.
    """

    warnings: tuple[str, ...] = ()

    def __init__(self, name: str, *, weight_type: str = AUTO) -> None:
        shape_name, colon, kind = name.removeprefix(PREFIX).partition(":")
        shape_name = known_shape(shape_name)
        if shape_name not in SHAPES or (colon and kind != INT4):
            raise ConfigError(
                f"{name!r} names no known shape; there are {', '.join(PREFIX + key for key in SHAPES)}, "
                f"each also with :{INT4} behind it"
            )
        self.name = name
        self.model = _model_config(shape_name, "fp16" if weight_type == AUTO else weight_type, int4=bool(colon))

    @property
    def tokenizer_dir(self) -> Path:
        """There is none: a WorkspaceError that says what has one."""
        raise WorkspaceError(
            f"{self.name} has no tokenizer: give token ids to its engine, or use a workspace or a checkpoint"
        )

    def engine_config(self, **overrides: Any) -> EngineConfig:
        """The engine's configuration as a new workspace's, and `overrides`, which win: see Workspace.engine_config.

        session_len may be more than max_position_embeddings: weights that nobody trained know no limit.
        """
        settings = new_settings(
            session_len=self.model.max_position_embeddings, tensor_parallel_size=_TENSOR_PARALLEL_SIZE
        )
        return build_engine_config(self.model, settings, overrides, where=Path(self.name))

    def kv_scales(self, rank: int) -> torch.Tensor:
        """Of an int8 KV cache, [num_layers, 4] fp32: as if a calibration had seen values from -8 to 8."""
        import torch

        return torch.tensor([[KV_RANGE / 255, 0.0] * 2] * self.model.num_layers)

    def tensors(self, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as tensor_layout lists them, drawn on the GPU where there is one, else on the CPU."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(0)
        specs = common_tensor_specs(self.model) | tensor_specs(self.model, _TENSOR_PARALLEL_SIZE, rank)
        for name, spec in specs.items():
            value = torch.empty(spec.shape, dtype=getattr(torch, _TORCH_NAMES[spec.dtype]), device=device)
            if name.endswith(".qweight"):
                value.random_(-(1 << 31), (1 << 31) - 1, generator=generator)
            elif name.endswith(".qzeros"):
                value.fill_(_ZERO_POINTS)
            elif name.endswith(".scales"):
                value.uniform_(0.5, 1.5, generator=generator).mul_(WEIGHT_STD / _LEVELS_STD)
            else:
                value.normal_(1.0 if name.endswith("norm.weight") else 0.0, WEIGHT_STD, generator=generator)
            yield name, value


def _model_config(shape_name: str, float_type: str, *, int4: bool) -> ModelConfig:
    drawn = get_args(FloatType)
    if float_type not in drawn:
        raise ConfigError(f"dtype={float_type!r} is not one of {', '.join((AUTO, *drawn))}")
    shape = SHAPES[shape_name]
    return ModelConfig(
        architecture="LlamaForCausalLM",
        model_name=shape_name,
        head_dim=shape.head_dim,
        norm_eps=1e-5,
        rope_theta=10000.0,
        weight_type=INT4 if int4 else float_type,  # type: ignore[arg-type]
        group_size=shape.group_size if int4 else 0,
        unquantized_type=float_type,  # type: ignore[arg-type]
        bos_token_id=1,
        eos_token_ids=(2,),
        **shape._asdict(),
    )
