"""Puts a load of requests on an endpoint from a few processes, and says what came of it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

import tritonmind
import tritonmind_tools
from tritonmind.errors import ConfigError, UnavailableError
from tritonmind_tools.bench.load_client import Outcome, Plan, Request, Share

CLIENT = "from tritonmind_tools.bench.load_client import main; main()"
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Target:
    """Where a load goes and what its prompts are. model: as the endpoint names it."""

    url: str
    model: str
    vocab_size: int
    num_processes: int
    text_prompts: bool = False
    timeout_s: float = REQUEST_TIMEOUT_S


@dataclass(frozen=True)
class LoadResult:
    """outcomes: of the requests that were sent. client_cpu: the share of a core that each process took."""

    outcomes: list[Outcome]
    client_cpu: list[float]


def poisson(requests: Sequence[tuple[int, int]], rate: float, duration: float | None, seed: int) -> list[Request]:
    """Requests that arrive `rate` times a second in the mean, with exponential times between them.

    All of `requests` once; or as many as arrive within `duration` seconds, from the beginning again where they end.
    """
    draw = random.Random(seed)
    arriving: list[Request] = []
    now = 0.0
    while duration is not None or len(arriving) < len(requests):
        now += draw.expovariate(rate)
        if duration is not None and now > duration:
            break
        arriving.append(Request(*requests[len(arriving) % len(requests)], arrival=now))
    return arriving


def run_load(target: Target, requests: Sequence[Request], *, num_slots: int = 0, seed: str = "0") -> LoadResult:
    """Send requests at their arrivals, or, those without one, `num_slots` at a time. Returns when all have ended.

    All processes have connected and had an answer before the first request. UnavailableError with the endpoint's words
    if one of them does not get that far, ConfigError if there is no request.
    """
    if not requests:
        raise ConfigError("no request arrives: make the rate, the duration or the number of requests larger")
    num_processes = min(target.num_processes, len(requests), num_slots or len(requests))
    with ExitStack() as stack:
        processes = []
        for number in range(num_processes):
            plan = Plan(
                url=target.url,
                model=target.model,
                requests=list(requests[number::num_processes]),
                num_slots=len(range(number, num_slots, num_processes)),
                vocab_size=target.vocab_size,
                seed=f"{seed} {number}",
                text_prompts=target.text_prompts,
                timeout_s=target.timeout_s,
            )
            process = stack.enter_context(_client())
            stack.callback(process.kill)
            _write(process, msgspec.json.encode(plan))
            processes.append(process)
        for process in processes:
            said = _read(process).decode().strip()
            if said != "ready":
                raise UnavailableError(f"{target.url} does not answer a first request: {said}")
        for process in processes:
            _write(process, b"go")
        shares = [msgspec.json.decode(_read(process), type=Share) for process in processes]
    outcomes = [outcome for share in shares for outcome in share.outcomes]
    return LoadResult(outcomes, [share.cpu_s / share.wall_s for share in shares])


def _client() -> subprocess.Popen[bytes]:
    # The same code as ours, wherever that was imported from.
    roots = dict.fromkeys(str(Path(package.__path__[0]).parent) for package in (tritonmind_tools, tritonmind))
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # a terminal's Ctrl-C is for us; we end the clients
    )


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()


def _read(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise UnavailableError(f"a client process ended with status {process.wait()}, see its errors above")
    return line
