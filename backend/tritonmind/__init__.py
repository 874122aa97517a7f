"""tritonmind: LLM serving as a backend plugin for NVIDIA Triton Inference Server.

`pipeline`, `LLM` and `SamplingParams` are the Python interface, loaded when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritonmind.engine.llm import LLM, Completion, StreamDelta
    from tritonmind.pipelines import Chat, Pipeline, pipeline
    from tritonmind.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Chat", "Completion", "Pipeline", "SamplingParams", "StreamDelta", "__version__", "pipeline"]

_MODULES = {
    "LLM": "tritonmind.engine.llm",
    "Completion": "tritonmind.engine.llm",
    "StreamDelta": "tritonmind.engine.llm",
    "Chat": "tritonmind.pipelines",
    "Pipeline": "tritonmind.pipelines",
    "pipeline": "tritonmind.pipelines",
    "SamplingParams": "tritonmind.sampling_params",
}


def __getattr__(name: str) -> object:
    """What needs PyTorch is imported late: the command line and the server's adapter do without."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
