"""The tokenizer folder of a workspace, and what the tokenizer says about special tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

from tritonmind.chat_template import TEMPLATE_FILE, TEMPLATE_JSON_FILE, TOOL_TEMPLATE_FILE
from tritonmind.errors import CheckpointError, ConfigError
from tritonmind.tokenizer import VOCABULARY_FILES, Tokenizer
from tritonmind.vocabularies.base import ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE

_COMPANIONS = (
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    TEMPLATE_FILE,
    TEMPLATE_JSON_FILE,
    TOOL_TEMPLATE_FILE,
)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary in the folder, in one of the formats that we read."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def collect_tokenizer(source: Path, destination: Path) -> None:
    """Copy the tokenizer files at `source` (a directory, or one of the files in it) to `destination`.

    Raises CheckpointError when there is no tokenizer or it cannot be loaded.
    """
    if not source.exists():
        raise CheckpointError(f"tokenizer {source} does not exist")
    folder = source if source.is_dir() else source.parent
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} has none of {', '.join(VOCABULARY_FILES)}: "
            "put the tokenizer's files there, or convert with --tokenizer-path"
        )
    _load(folder)
    for name in (*VOCABULARY_FILES, *_COMPANIONS):
        if (folder / name).is_file():
            (destination / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, destination / name)


def special_token_id(folder: Path, role: str) -> int | None:
    """The id of `role` ("bos_token" or "eos_token") by the tokenizer in `folder`, None where it has none."""
    tokenizer = _load(folder)
    token = tokenizer.special_tokens.get(role)
    return None if token is None else tokenizer.vocabulary.token_id(token)


def _load(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_dir(folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
