"""The engine in its own process: `python -m tritonmind.engine.core_process`, started by `client.py` only.

The first line of standard input is a JSON object: the model's path, the overrides, and the two ipc addresses. Standard
input then stays open as a lifeline: when it ends, the parent is gone and so are we, wherever the loop is.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
import traceback

import msgspec
import zmq

from tritonmind.engine.allocator import use_expandable_segments
from tritonmind.engine.core import EngineCore
from tritonmind.engine.device import resolve_device
from tritonmind.engine.loop import run_engine
from tritonmind.errors import TritonmindError
from tritonmind.messages import EngineFailed, FromEngine, ToEngine
from tritonmind.model_source import open_model, opening_options

LIFELINE_FD = 0  # standard input
# Objects that must have come and stayed before the collector looks for cycles, of which a step makes none: on its way
# it would walk the token ids of all requests that wait.
GC_THRESHOLD = 100_000
LINGER_MS = 2000  # how long the last message may take to reach the parent


def main() -> int:
    """Run the engine until told to shut down. 0 after a shutdown, 1 after a failure, which was sent as EngineFailed."""
    # A terminal's Ctrl-C goes to the whole process group; the parent decides when we stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s engine %(levelname)s %(message)s")
    setup = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_with_parent, name="lifeline", daemon=True).start()

    context = zmq.Context()
    inbox = context.socket(zmq.PULL)
    inbox.connect(setup["to_engine"])
    outbox = context.socket(zmq.PUSH)
    outbox.set_hwm(0)  # a slow reader must not stall the engine; the reader's queue is bounded by its live requests
    outbox.connect(setup["from_engine"])
    decoder = msgspec.msgpack.Decoder(ToEngine)
    encoder = msgspec.msgpack.Encoder()

    def receive(timeout_s: float) -> list[ToEngine]:
        messages: list[ToEngine] = []
        while inbox.poll(0 if messages else int(timeout_s * 1000)):
            messages += map(decoder.decode, inbox.recv_multipart())
        return messages

    def send(message: FromEngine) -> None:
        outbox.send(encoder.encode(message))

    try:
        overrides = setup["overrides"]
        source = open_model(setup["model"], **opening_options(overrides))
        config = source.engine_config(**overrides)
        use_expandable_segments(resolve_device(config.device))
        core = EngineCore(source, config)
        # Weights and modules live as long as we do: keep the collector from walking them during a step.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD, 10, 10)
        run_engine(core, receive, send)
    except TritonmindError as error:
        send(EngineFailed(error=str(error), code=error.code))
        return 1
    except BaseException as error:
        traceback.print_exc()
        send(EngineFailed(error=f"{type(error).__name__}: {error}", code="INTERNAL"))
        return 1
    finally:
        context.destroy(linger=LINGER_MS)
        gc.unfreeze()  # or libraries that count their objects at exit would report these as leaks
    return 0


def _exit_with_parent() -> None:
    # Not through sys.stdin: a thread blocked in its lock would be fatal when the interpreter shuts down.
    while os.read(LIFELINE_FD, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
