"""What can go wrong for a user, as exceptions that name the field, the value and the remedy.

Each class carries the error code a Triton server answers with. Invariants of our own code are asserts, not these.
"""


class TritonmindError(Exception):
    """A failure whose message is written for the user. `code` is the name of a Triton server error code."""

    code = "INTERNAL"


class InvalidRequestError(TritonmindError):
    """A request field is missing, out of range or of the wrong kind."""

    code = "INVALID_ARG"

    def __init__(self, field: str, value: object, expected: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}={shown} is invalid: {expected}")
        self.field = field


class UnavailableError(TritonmindError):
    """The engine cannot take or finish the request now: queue full, engine down, deadline exceeded."""

    code = "UNAVAILABLE"


class BusyError(UnavailableError):
    """The session has another request at work."""


class DeadlineError(UnavailableError):
    """The request's own time limit passed."""

    def __init__(self, timeout_ms: float) -> None:
        super().__init__(f"deadline exceeded after {timeout_ms:g} ms")


class NotFoundError(TritonmindError):
    """What the request refers to is not there, or no longer."""

    code = "NOT_FOUND"


class CancelledError(TritonmindError):
    """The client gave the request up."""

    code = "CANCELLED"


class ConfigError(TritonmindError):
    """An option, a config.ini key or a model fact is wrong. The message says where, what and what to do."""

    code = "INVALID_ARG"


class CheckpointError(TritonmindError):
    """A checkpoint cannot be converted: missing files, unsupported architecture or feature, damaged tensors."""

    code = "INVALID_ARG"


class WorkspaceError(TritonmindError):
    """A workspace is missing, damaged or inconsistent with itself."""

    code = "INVALID_ARG"
