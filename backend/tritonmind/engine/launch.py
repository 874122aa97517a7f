"""Starts an engine and waits until it is ready."""

from __future__ import annotations

from tritonmind.engine.client import EngineClient


def start_engine(
    model_path: str,
    overrides: dict[str, object],
    *,
    in_process: bool = False,
    python: str | None = None,
) -> EngineClient:
    """Start an engine on a workspace or a checkpoint and wait until it is ready.

    overrides: fields of EngineConfig and of its parts, over config.ini. in_process: a thread here instead of a process
    of its own. python: the interpreter of that process; by default one like ours is looked for.
    Raises TritonmindError with the cause when the engine cannot start.
    """
    # Both are imported here because one needs torch and the other must not.
    client: EngineClient
    if in_process:
        from tritonmind.engine.thread_client import ThreadEngineClient

        client = ThreadEngineClient(model_path, overrides)
    else:
        from tritonmind.engine.process_client import ProcessEngineClient

        client = ProcessEngineClient(model_path, overrides, python=python)
    client.wait_ready()
    return client
