"""Directories that are filled under a name of their own, and moved into place when all is there."""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

# A directory exists for a moment before its process has locked it.
MIN_AGE_S = 5.0


@contextmanager
def partial_directory(parent: Path, name: str) -> Iterator[Path]:
    """A new directory `.{name}.*.partial` in `parent`, removed when the context ends unless it was moved away.

    Those that killed processes left there under this name are removed first: a living one holds a lock on its own, in
    another container too.
    """
    for path in parent.glob(f".{glob.escape(name)}.*.partial"):
        if _is_abandoned(path):
            logger.warning("%s was left by a process that was killed: it is removed", path)
            shutil.rmtree(path, ignore_errors=True)
    path = parent / f".{name}.{uuid.uuid4().hex}.partial"
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    """Whether no process holds the directory. What cannot be opened or locked is left alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        return time.time() - os.stat(descriptor).st_mtime > MIN_AGE_S and _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the lock was free. Some network file systems have none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
