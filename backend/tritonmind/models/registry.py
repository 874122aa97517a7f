"""Architecture name, as a checkpoint's config.json has it, to the decoder that serves it."""

from __future__ import annotations

from tritonmind.errors import ConfigError
from tritonmind.families import ARCHITECTURES as NAMES
from tritonmind.models.llama import LlamaForCausalLM

# One decoder: how the architectures differ from it, families.py says.
ARCHITECTURES: dict[str, type[LlamaForCausalLM]] = dict.fromkeys(NAMES, LlamaForCausalLM)


def model_class(architecture: str) -> type[LlamaForCausalLM]:
    """The decoder class; ConfigError listing the known ones if there is none."""
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"architecture {architecture!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[architecture]
