"""tritonmind: LLM serving as a backend plugin for NVIDIA Triton Inference Server."""

__version__ = "0.1.0"
