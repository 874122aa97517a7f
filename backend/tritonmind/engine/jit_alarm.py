"""Counts the Triton kernels that were compiled, or loaded from Triton's cache, after the engine was ready.

Each is a stall of milliseconds to seconds in the middle of serving, and means that the warm-up missed a variant.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class JitAlarm:
    """Armed once the engine is warm. One a process: Triton has one hook."""

    def __init__(self) -> None:
        self.num_compiles = 0

    def arm(self, device: torch.device) -> None:
        """Count from now on, in place of an earlier engine's alarm."""
        _set_hook(self._on_compile, device)

    def disarm(self, device: torch.device) -> None:
        """Count no more: a warm-up begins."""
        _set_hook(None, device)

    def _on_compile(self, *, repr: str, is_manual_warmup: bool, **_: Any) -> None:
        self.num_compiles += 1
        logger.warning("a kernel was compiled after the engine was ready: %s", repr)


def _set_hook(hook: Callable[..., None] | None, device: torch.device) -> None:
    """A CPU runs no Triton kernels, and may have no Triton."""
    if device.type == "cuda":
        import triton

        triton.knobs.runtime.jit_post_compile_hook = hook
