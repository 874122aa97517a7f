"""Workspaces for tests, made the way a user makes them: a checkpoint and `tritonmind convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def convert(checkpoint: Path, destination: Path, *options: str, model_name: str = "tiny") -> Path:
    """Run `tritonmind convert` and return the workspace."""
    from tritonmind_tools.cli import main

    status = main(["convert", model_name, str(checkpoint), "--dst-path", str(destination), *options])
    assert status == 0, f"convert failed with status {status}"
    return destination


def tiny_workspace(directory: Path, *options: str, **checkpoint: Any) -> Path:
    """A workspace of a tiny random Llama, fp32."""
    # Imported here: the server's tests must run where Transformers does not (it may want another NumPy).
    from tests.checkpoints import make_llama_checkpoint

    make_llama_checkpoint(directory / "checkpoint", **checkpoint)
    return convert(directory / "checkpoint", directory / "workspace", "--weight-type", "fp32", *options)


def convert_smollm2(directory: Path) -> Path:
    """A workspace of the demo model, SmolLM2-135M-Instruct, with the exact fp32 values of its GGUF file."""
    from tritonmind_tools.demo import demo_checkpoint

    return convert(demo_checkpoint(), directory / "smollm2", "--weight-type", "fp32", model_name="smollm2")
