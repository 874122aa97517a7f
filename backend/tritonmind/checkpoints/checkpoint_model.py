"""A checkpoint that an engine reads itself: what `convert` would write to a workspace, made while loading."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.checkpoints.reading import AUTO, model_config, open_checkpoint, read_weights
from tritonmind.checkpoints.tokenizer_files import special_token_id
from tritonmind.config import EngineConfig
from tritonmind.config_ini import build_engine_config, new_settings
from tritonmind.hub import name_of
from tritonmind.named_templates import contradiction, named_template
from tritonmind.template_choice import TemplateChoice, choose_template
from tritonmind.tensor_layout import common_tensor_specs, tensor_specs
from tritonmind.weight_files import to_stored

if TYPE_CHECKING:
    import torch

_TENSOR_PARALLEL_SIZE = 1


class CheckpointModel:
    """A checkpoint opened for serving, read like a Workspace; nothing is written beside it.

    weight_type, model_name, chat_template, allow_pickle: as convert's options; the name is by default what the path
    says. Opening reads the configuration, not the weights. Raises CheckpointError for a checkpoint that `convert` would
    refuse: here for its configuration, in `tensors` for its weights. warnings: what the user should know.
    """

    def __init__(
        self,
        path: Path,
        *,
        weight_type: str = AUTO,
        model_name: str | None = None,
        chat_template: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self.path = path
        self._checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
        name = model_name or name_of(path)
        model = model_config(
            self._checkpoint,
            model_name=name,
            weight_type=weight_type,
            special_token_id=lambda role: special_token_id(self._tokenizer_files, role),
        )
        self._template = TemplateChoice()
        in_place = self._checkpoint.tokenizer_in_place() is not None
        if in_place or chat_template is not None or named_template(name) is not None:  # else its files are made later
            self._template = choose_template(self._tokenizer_files, model_name=name, given=chat_template)
        self.model = dataclasses.replace(model, eos_token_ids=self._template.end_tokens(model))
        odd = model_name and contradiction(model_name, self._checkpoint.config["architectures"][0])
        self.warnings = (*([odd] if odd else ()), *self._template.warnings)

    @cached_property
    def tokenizer_dir(self) -> Path:
        """The checkpoint's own directory, or a temporary one that lives as long as this object."""
        directory = self._tokenizer_files
        if self._template.source is not None:
            if directory == self._checkpoint.tokenizer_in_place():
                directory = self._copied_tokenizer()
            self._template.write(directory)
        return directory

    @cached_property
    def _tokenizer_files(self) -> Path:
        """The same without the chat template that was chosen."""
        return self._checkpoint.tokenizer_in_place() or self._copied_tokenizer()

    def _copied_tokenizer(self) -> Path:
        directory = Path(tempfile.mkdtemp(prefix="tritonmind-tokenizer-"))
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self._checkpoint.write_tokenizer(directory)
        return directory

    def engine_config(self, **overrides: Any) -> EngineConfig:
        """The engine's configuration as a new workspace's, and `overrides`, which win: see Workspace.engine_config."""
        settings = new_settings(
            session_len=self.model.max_position_embeddings, tensor_parallel_size=_TENSOR_PARALLEL_SIZE
        )
        return build_engine_config(self.model, settings, overrides, where=self.path)

    def kv_scales(self, rank: int) -> None:
        """None: a calibration's scales are in a workspace."""

    def tensors(self, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, CPU tensor), the values that a workspace of this checkpoint would hold.

        Raises CheckpointError naming file and tensor.
        """
        import torch

        specs = common_tensor_specs(self.model) | tensor_specs(self.model, _TENSOR_PARALLEL_SIZE, rank)
        for name, blocks in read_weights(self._checkpoint, self.model, _TENSOR_PARALLEL_SIZE):
            stored = [to_stored(specs[name], block) for block in blocks]
            yield name, stored[0] if len(stored) == 1 else torch.cat(stored)
