"""What went wrong, read from a Triton server's log, in words for a user instead of a log."""

from __future__ import annotations

import re
import signal

_MODEL_FAILED = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<why>.*)")
_POLL_FAILED = re.compile(r"Poll failed for model directory '[^']*': (?P<why>.*)")
_START_FAILED = re.compile(r"(?:Failed to start|failed to start) (?P<why>.*)")
_GENERAL = re.compile(r"^error: (?P<why>.*)")
# What Triton puts before the backend's own words.
_PREFIX = re.compile(
    r"^(?:Internal|Unavailable|Invalid argument|Not found|Unknown|Already exists|Unsupported)(?::| -) "
    r"|^TritonModelException: |^(?:\w+\.)*(?:Tritonmind|Workspace|Config|Unavailable)Error: "
)
_HINTS = (
    (re.compile(r"(?i)unable to (?:initialize|create|grow) shared memory"
                r"|(?:/dev/shm|shared memory|shm_).*no space left on device"
                r"|no space left on device.*(?:/dev/shm|shared memory)"),
     "shared memory is full: free /dev/shm (leftover triton_python_backend_* files of crashed servers) or enlarge it"),
    (re.compile(r"libpython[\w.]+: cannot open shared object file"),
     "the shared library of Python was not found: install libpython for this Python version"),
    (re.compile(r"bad_alloc|Cannot allocate memory|DefaultCPUAllocator: (?:can't|not enough) memory"),
     "out of memory: close other programs, or lower session_len and cache_max_entry_count in config.ini"),
)  # fmt: skip
# With the path before it, as C programs have it, or behind it in quotes, as Python has it.
_DISK_FULL = re.compile(r"(?:(?P<before>/[^\s:]+): )?No space left on device(?:: \\?['\"](?P<behind>[^'\"\\]+))?")


def failure_cause(log: str, return_code: int | None) -> str:
    """One or two lines for a user: why the server with this log failed.

    return_code: of the server's process, negative for a signal; None while it runs.
    """
    backend = _first(_MODEL_FAILED, log) or _first(_POLL_FAILED, log)
    for pattern, hint in _HINTS:
        if pattern.search(log):
            return f"{hint} ({backend})" if backend else hint
    full = _DISK_FULL.search(log)
    if full:
        path = full["before"] or full["behind"]
        return f"the disk is full: {path} could not be written" if path else "the disk is full"
    if return_code == -signal.SIGKILL:
        return "the server was killed, most likely by the system for lack of memory"
    found = backend or _first(_START_FAILED, log) or _first(_GENERAL, log)
    if found:
        return found
    if return_code is not None and return_code < 0:
        return f"the server crashed with {signal.Signals(-return_code).name}"
    return f"the server ended with exit code {return_code} and gave no reason"


def _first(pattern: re.Pattern[str], log: str) -> str | None:
    for line in log.splitlines():
        match = pattern.search(line)
        if match:
            return _clean(match["why"])
    return None


def _clean(text: str) -> str:
    """Drop the log's escapes and closing quote, the traceback and the prefixes that Triton adds."""
    text = text.replace("\\n", "\n").replace('\\"', '"')
    text = text.partition("\n\nAt:")[0].strip().removesuffix('"').strip()
    stripped = _PREFIX.sub("", text)
    while stripped != text:
        text, stripped = stripped, _PREFIX.sub("", stripped)
    return "\n".join(line for line in text.splitlines()[:2])
