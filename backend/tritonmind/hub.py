"""Checkpoints by their name on the Hugging Face hub, through huggingface_hub.

Its cache, HF_HUB_OFFLINE, HF_ENDPOINT and the token (HF_TOKEN, or the one that `hf auth login` stored) work as with it.
The network is used for a name that the user gave and for nothing else, and for pickle files only if they are allowed
and nothing else is there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from tritonmind.errors import CheckpointError

_HUB_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# What a checkpoint is read from, in the repository's top folder.
PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "*.tiktoken",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "consolidated.*.pth", "params.json")
# A pattern's * stands for folders too. Mistral's repositories have the same weights once more under names of its own.
_IGNORED = (*(f"*/{pattern}" for pattern in (*PATTERNS, *_PICKLES)), "consolidated*.safetensors")


class LocalModel(NamedTuple):
    """name: what to call the model, where its path does not say it."""

    path: Path
    name: str | None = None


def name_of(path: Path) -> str:
    """What a checkpoint's path calls it: its last part, but of a snapshot in the hub's cache the repository's name."""
    full = path.resolve()
    repository = full.parent.parent.name
    if full.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return full.name if path.is_dir() else full.stem


def local_model(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> LocalModel:
    """Where a model is. A text that is no path here and reads ORGANISATION/NAME or ORGANISATION/NAME@REVISION comes
    from the hub: its safetensors, configuration and tokenizer. allow_pickle: where it has no safetensors, its pickle
    files.

    Raises CheckpointError for a name that the hub does not have, may not give or cannot be asked for.
    """
    match = _HUB_NAME.fullmatch(path) if isinstance(path, str) and not Path(path).exists() else None
    if match is None:
        return LocalModel(Path(path))
    path = match[0]
    repository = match["repository"]
    folder = _download(repository, match["revision"], path, PATTERNS)
    if not any(folder.glob("*.safetensors")):
        if not allow_pickle:
            raise CheckpointError(
                f"{path}: that repository has no safetensors: take another, or, if you trust where it is from, give "
                "--allow-pickle, which downloads its pickle files and reads them with PyTorch's restricted unpickler"
            )
        folder = _download(repository, match["revision"], path, (*PATTERNS, *_PICKLES))
    return LocalModel(folder, repository.rpartition("/")[2])


def _download(repository: str, revision: str | None, path: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    remedy = f"If a local path was meant: {path} does not exist here."
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)
            )
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{path}: access to that repository must be granted on its page, and HF_TOKEN must be a token of yours"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{path}: the repository {repository} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{path}: the hub has no such repository, or shows it only with a token (HF_TOKEN). {remedy}"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        cause = _first_line(error).removeprefix("Got: ")
        why = "HF_HUB_OFFLINE forbids asking the hub" if _is_offline() else f"the hub cannot be reached ({cause})"
        raise CheckpointError(f"{path} is not in the cache, and {why}. {remedy}") from None
    # Each version brings the exceptions of another HTTP library; a full disk is the user's to see as it is.
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise CheckpointError(f"{path} cannot be downloaded: {_first_line(error)}. {remedy}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
