"""The tokenizer folder of a workspace, and what the tokenizer says about special tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tritonmind.checkpoints.source import read_json
from tritonmind.errors import CheckpointError

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
_COMPANIONS = (
    TOKENIZER_CONFIG,
    SENTENCEPIECE_MODEL,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def collect_tokenizer(source: Path, destination: Path) -> None:
    """Copy the tokenizer files at `source` (a directory, or one of the files in it) to `destination`.

    Where there is only a SentencePiece tokenizer.model, tokenizer.json is made from it by Transformers.
    Raises CheckpointError when there is no tokenizer or it cannot be loaded.
    """
    if not source.exists():
        raise CheckpointError(f"tokenizer {source} does not exist")
    folder = source if source.is_dir() else source.parent
    if not (folder / TOKENIZER_JSON).is_file() and not (folder / SENTENCEPIECE_MODEL).is_file():
        raise CheckpointError(
            f"{folder} has neither {TOKENIZER_JSON} nor {SENTENCEPIECE_MODEL}: "
            "put the tokenizer's files there, or convert with --tokenizer-path"
        )
    for name in (TOKENIZER_JSON, *_COMPANIONS):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, destination / name)
    if not (destination / TOKENIZER_JSON).is_file():
        _from_sentencepiece(folder, destination)
    _load(destination, shown=folder / TOKENIZER_JSON)


def special_token_id(folder: Path, role: str) -> int | None:
    """The id of `role` ("bos_token" or "eos_token") by the collected tokenizer, None where it has none."""
    path = folder / TOKENIZER_CONFIG
    token: Any = read_json(path).get(role) if path.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        return None
    token_id: int | None = _load(folder, shown=folder / TOKENIZER_JSON).token_to_id(token)
    return token_id


def _load(folder: Path, *, shown: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    # The library raises bare Exception for every kind of damage.
    except Exception as error:
        raise CheckpointError(f"{shown} is no tokenizer that the tokenizers library can load: {error}") from None


def _from_sentencepiece(folder: Path, destination: Path) -> None:
    model = folder / SENTENCEPIECE_MODEL
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise CheckpointError(
            f"{folder} has {SENTENCEPIECE_MODEL} but no {TOKENIZER_JSON}; making it needs the package transformers"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.save(str(destination / TOKENIZER_JSON))
    except (AttributeError, ImportError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{model} cannot be turned into {TOKENIZER_JSON} by Transformers: {error}") from error
