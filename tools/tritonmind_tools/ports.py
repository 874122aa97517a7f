"""TCP ports of this machine: is one free, and who holds it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tritonmind.errors import ConfigError, TritonmindError, UnavailableError

_LISTEN = "0A"


class PortTakenError(UnavailableError):
    """Another program listens on the port."""


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nothing used a moment ago."""
    with socket.socket(_family(address)) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def check_port(port: int, option: str) -> None:
    """Raise ConfigError naming the `option` unless there is a port of that number, or it is 0."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{option}={port} must be 1 to 65535, or 0 for a free one")


def ensure_port_free(address: str, port: int, option: str) -> None:
    """Raise PortTakenError naming the port, its holder when that is visible, and the `option` that changes it.

    ConfigError where there is no such port, or no such address on this machine.
    """
    check_port(port, option)
    with socket.socket(_family(address)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT counts as free
        try:
            probe.bind((address, port))
        except PermissionError:
            raise TritonmindError(f"{option}={port}: this user may not listen on it; use a port above 1023") from None
        except OSError as error:
            holder = port_holder(port)
            if holder is None and error.errno != errno.EADDRINUSE:
                raise ConfigError(
                    f"cannot listen on the address {address!r} ({error.strerror}): give one of this machine, such as "
                    "127.0.0.1, or 0.0.0.0 for all of them"
                ) from None
            by = f" by {holder}" if holder else ""
            raise PortTakenError(
                f"port {port} is taken{by}; stop that program or choose another port with {option}"
            ) from None


def port_holder(port: int) -> str | None:
    """The program listening on `port`, as "NAME (process ID)", or None when it belongs to somebody we cannot see."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        if not inodes.isdisjoint(_open_files(process)):
            return f"{(process / 'comm').read_text().strip()} (process {process.name})"
    return None


def _open_files(process: Path) -> Iterator[str]:
    """What the descriptors of a /proc/ID folder point to; nothing for another user's process or one that has ended."""
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile, as the one that lists the folder is
                yield os.readlink(descriptor)


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
