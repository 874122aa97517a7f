"""The engine's own loop: messages in, steps, messages out. Runs in a process of its own or in a thread.

Order of one turn: take every message that has come (waiting for one only when idle), step, send the step's outputs as
one message, then, a few times a second, a heartbeat. Becoming idle runs the integrity check.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tritonmind.engine.core import EngineCore
from tritonmind.messages import (
    Abort,
    Call,
    EngineRequest,
    FromEngine,
    Heartbeat,
    Reply,
    StepOutputs,
    ToEngine,
)

HEARTBEAT_INTERVAL_S = 0.25

Receive = Callable[[float], list[ToEngine]]  # waits up to that many seconds for the first message
Send = Callable[[FromEngine], None]


def run_engine(core: EngineCore, receive: Receive, send: Send) -> None:
    """Serve until a shutdown call. What a step raises goes through: the engine cannot go on after it."""
    send(core.info)
    next_heartbeat = 0.0
    checked = False
    while True:
        timeout = 0.0 if core.has_work else max(0.0, next_heartbeat - time.monotonic())
        for message in receive(timeout):
            checked = False
            if not _handle(core, message, send):
                return
        if core.has_work:
            outputs = core.step()
            if outputs:
                send(outputs)
        elif not checked and core.config.check_integrity_when_idle:
            core.check_integrity()
            checked = True
        if time.monotonic() >= next_heartbeat:
            send(Heartbeat(stats=core.stats()))
            next_heartbeat = time.monotonic() + HEARTBEAT_INTERVAL_S


def _handle(core: EngineCore, message: ToEngine, send: Send) -> bool:
    """Act on one message; False after a shutdown call."""
    match message:
        case EngineRequest():
            core.add(message)
        case Abort():
            outputs = core.abort(message.request_ids)
            if outputs:
                send(StepOutputs(outputs=outputs))
        case Call(method="shutdown"):
            send(Reply(call_id=message.call_id))
            return False
        case Call():
            send(_reply(core, message))
    return True


def _reply(core: EngineCore, call: Call) -> Reply:
    if call.method == "check_integrity":
        try:
            core.check_integrity()
        except AssertionError as error:
            return Reply(call_id=call.call_id, error=f"integrity check failed: {error}")
    elif call.method == "reset_prefix_cache":
        core.reset_prefix_cache()
    return Reply(call_id=call.call_id, stats=core.stats())
