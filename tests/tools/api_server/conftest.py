"""The API server with real weights: over an engine of its own, and over a real Triton server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.server_fixture import running as running_triton
from tests.tools.api_server.scripted import app_of, running

from tritonmind_tools.api_server.backends import Backend
from tritonmind_tools.api_server.local_backend import LocalBackend
from tritonmind_tools.api_server.triton_backend import TritonBackend

SMOLLM2 = "smollm2"
TIMEOUT_S = 240.0


@pytest.fixture(scope="module", params=["engine", "triton"])
def url(request: pytest.FixtureRequest, smollm2_workspace: Path) -> Iterator[str]:
    """An API server over SmolLM2, with tools described by ourselves: its template knows none."""
    if request.param == "engine":
        backend: Backend = LocalBackend(str(smollm2_workspace), {"session_len": 2048}, name=SMOLLM2)
        with running(app_of(backend, tool_parser="prompt")) as url:
            yield url
        backend.close()
        return
    with running_triton(smollm2_workspace) as server:
        backend = TritonBackend(server.address, name=SMOLLM2)
        with running(app_of(backend, tool_parser="prompt")) as url:
            yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        yield client
