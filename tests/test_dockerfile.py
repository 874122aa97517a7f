"""The Dockerfile's steps, as far as they go without a container engine."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path

import pytest

from tritonmind import __version__
from tritonmind.config import DRAIN_FILE_VARIABLE
from tritonmind.resources import resource
from tritonmind_tools import embedded_server

ROOT = Path(__file__).resolve().parent.parent


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) pairs; continued lines joined, comments dropped."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def of(kind: str) -> list[str]:
    return [arguments for name, arguments in instructions() if name == kind]


def copied_sources() -> list[str]:
    sources = []
    for arguments in of("COPY"):
        if "--from=" not in arguments:
            sources += arguments.split()[:-1]
    return sources


def test_base_image_is_pinned() -> None:
    images = [image.split()[0] for image in of("FROM")]
    assert re.fullmatch(r"nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-py3", images[0])
    assert set(images[1:]) == {"base"}


@pytest.mark.parametrize("source", copied_sources())
def test_copied_paths_exist_and_are_not_ignored(source: str) -> None:
    assert (ROOT / source).exists()
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), f"{source} is hidden by .dockerignore"


def test_wheel_stage_has_all_the_build_reads() -> None:
    config = (ROOT / "setup.cfg").read_text()
    read = set(re.findall(r"^share/\S+ = (\S+)$", config, re.M)) | set(
        re.findall(r"^license_files = (\S+)$", config, re.M)
    )
    read |= set(re.findall(r"file: (\S+)", config)) | {"setup.cfg", "pyproject.toml", "backend", "tools"}
    for path in read:
        assert any(path == source or path.startswith(source + "/") for source in copied_sources()), path


def test_only_the_adapter_is_copied_into_the_backend() -> None:
    installs = [step for step in of("RUN") if "/opt/tritonserver/backends" in step]
    assert len(installs) == 1
    assert shlex.split(installs[0])[-1] == "/opt/tritonserver/backends/tritonmind/model.py"
    code = re.search(r"python3 -c '([^']+)'", installs[0])
    assert code
    shown: list[Path] = []
    exec(code[1], {"print": shown.append})
    assert shown == [resource("backend/model.py")]


def test_numpy_stays_below_two_in_each_install() -> None:
    for step in of("RUN"):
        if "pip install" in step:
            assert "numpy<2" in step


def test_ports_and_health_check_are_the_scripts() -> None:
    ports = [
        embedded_server.DEFAULT_GRPC_PORT,
        embedded_server.DEFAULT_HTTP_PORT,
        embedded_server.DEFAULT_METRICS_PORT,
    ]
    assert of("EXPOSE") == [" ".join(map(str, ports))]
    assert f"127.0.0.1:{ports[0]}" in of("HEALTHCHECK")[0]
    assert embedded_server.MODEL_NAME in of("HEALTHCHECK")[0]
    for port in ports:
        assert f"={port}" in of("CMD")[-1]


def test_requests_can_be_drained_in_time() -> None:
    variables = dict(pair.split("=", 1) for arguments in of("ENV") for pair in arguments.split())
    assert variables[DRAIN_FILE_VARIABLE].startswith("/tmp/")
    assert f'"--exit-timeout-secs={int(embedded_server.STOP_TIMEOUT_S) - 1}"' in of("CMD")[-1]


def test_comment_builds_this_version() -> None:
    assert f"tritonmind:{__version__} ." in (ROOT / "Dockerfile").read_text()
