"""What a model is read from: a workspace that `convert` wrote, a checkpoint as it stands, or nothing but a shape."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from tritonmind.checkpoints.checkpoint_model import CheckpointModel
from tritonmind.checkpoints.meta_checkpoint import PARAMS
from tritonmind.checkpoints.reading import AUTO
from tritonmind.checkpoints.source import CONFIG
from tritonmind.config import EngineConfig, ModelConfig
from tritonmind.errors import ConfigError, WorkspaceError
from tritonmind.hub import local_model
from tritonmind.random_model import PREFIX, RandomModel
from tritonmind.workspace import Workspace

if TYPE_CHECKING:
    import torch


class ModelSource(Protocol):
    """A model ready to be read: see Workspace, whose methods these are."""

    model: ModelConfig

    @property
    def tokenizer_dir(self) -> Path:
        """Where tokenizer, chat template and generation_config.json are."""
        ...

    def engine_config(self, **overrides: Any) -> EngineConfig:
        """The engine's configuration."""
        ...

    def tensors(self, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The common tensors and those of `rank`, as tensor_layout lists them."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know about it."""
        ...

    def kv_scales(self, rank: int) -> torch.Tensor | None:
        """Scales of a calibrated int8 KV cache, None where nothing was calibrated."""
        ...


def opening_options(overrides: Mapping[str, object]) -> dict[str, Any]:
    """What of an engine's options open_model takes. Raises ConfigError."""
    value = overrides.get("allow_pickle", False)
    try:
        allow_pickle = msgspec.convert(value, bool, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"allow_pickle={value!r} is invalid: {error}") from None
    return {"dtype": overrides.get("dtype", AUTO), "allow_pickle": allow_pickle}


def open_model(
    path: str | os.PathLike[str],
    *,
    dtype: object = AUTO,
    model_name: str | None = None,
    chat_template: str | None = None,
    allow_pickle: bool = False,
) -> ModelSource:
    """The workspace or the checkpoint at `path`, or, for `random:SHAPE`, random weights of that shape.

    path: a local one, or a checkpoint's name on the hub, as hub.local_model takes it. dtype: the type that the engine
    was asked to compute in. A checkpoint's weights are rounded to it and to nothing else; for auto they get the type
    that `convert` stores. A workspace's are what they are. model_name, chat_template: of a checkpoint, as `convert`'s;
    a workspace has its own. allow_pickle: a checkpoint's weights may be in pickle files. Raises WorkspaceError,
    CheckpointError or ConfigError.
    """
    if str(path).startswith(PREFIX):
        return RandomModel(str(path), weight_type=str(dtype))
    given, name = local_model(str(path), allow_pickle=allow_pickle)
    model_name = model_name or name
    if not given.exists():
        raise WorkspaceError(
            f"{given} does not exist: give a workspace, a checkpoint's directory, a .gguf file or a name on the "
            "Hugging Face hub, ORGANISATION/NAME"
        )
    if given.is_dir() and not any((given / file).is_file() for file in (CONFIG, PARAMS)):
        if chat_template is not None:
            raise ConfigError(
                f"{given} is a workspace, which has the chat template that `tritonmind convert` gave it: "
                "convert again, put a chat_template.jinja into triton_models/tokenizer in it, or open the checkpoint"
            )
        workspace = Workspace.open(given)
        name = workspace.model.model_name
        if model_name not in (None, name):
            workspace.warnings = (f"{given} is a workspace of {name}: the name {model_name} says nothing about it",)
        return workspace
    return CheckpointModel(
        given,
        weight_type=str(dtype),
        model_name=model_name,
        chat_template=chat_template,
        allow_pickle=allow_pickle,
    )
