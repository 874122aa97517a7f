"""How PyTorch takes a card's memory in an engine's process: in segments that grow.

They follow what tensors take, where segments of fixed size keep what is left over of each. Part of a card (vGPU) may
not have them: their first allocation fails. Under WSL that may be a later one, when it is too late for anything else.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# By which a user sets the allocator up: by its name of today, and by the earlier one.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
KERNEL_RELEASE = Path("/proc/sys/kernel/osrelease")


def use_expandable_segments(device: torch.device) -> None:
    """Have PyTorch do so on a CUDA device, where that works and the user has not set its allocator up.

    It is for what is allocated from now on: to be called before anything is.
    """
    # Not the variables: of the two PyTorch 2.9 ignores the new one, and later ones warn of the old one.
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or getattr(
        torch.cuda.memory, "_set_allocator_settings", None
    )
    if device.type != "cuda" or configure is None or any(name in os.environ for name in VARIABLES) or _is_wsl():
        return
    configure("expandable_segments:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        # If it is the card that has a fault, the engine's check of it will say so.
        configure("expandable_segments:False")
        logger.warning("the card's memory is taken in segments of fixed size: %s", str(error).partition("\n")[0])
    else:
        logger.info("the card's memory is taken in segments that grow")


def _is_wsl() -> bool:
    return KERNEL_RELEASE.exists() and "microsoft" in KERNEL_RELEASE.read_text().lower()
