"""Options that the commands of `lite` share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tritonmind.errors import ConfigError

if TYPE_CHECKING:
    import torch

DEFAULT_WORK_DIR = Path("work_dir")
DEVICES = ("auto", "cpu", "cuda")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """--model, --allow-pickle, --work-dir and --device."""
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory or .gguf file")
    parser.add_argument("--allow-pickle", action="store_true", help="its weights may be in pickle files")
    parser.add_argument("--work-dir", type=Path, default=DEFAULT_WORK_DIR, help="default: ./%(default)s")
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[0], help="auto is a GPU where there is one")


def boolean(text: str) -> bool:
    """True or False as the tutorial's commands spell them, in any case."""
    if text.lower() not in _BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return _BOOLEANS[text.lower()]


def pick_device(name: str) -> torch.device:
    """The device of that name. Raises ConfigError for a GPU that is not there."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device=cuda: PyTorch finds no GPU; use --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
