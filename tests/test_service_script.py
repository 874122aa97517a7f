"""service_docker_up.sh with stand-ins for docker, nvidia-smi and tritonmind that write down how they were called."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tritonmind_tools import embedded_server

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "service_docker_up.sh"
IMAGE = "tritonmind:9.9.9"

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# What the script itself needs; PATH holds nothing else, so that a real docker or tritonmind is never reached.
SYSTEM_TOOLS = (
    "bash",
    "cat",
    "dirname",
    "grep",
    "head",
    "mktemp",
    "sed",
    "seq",
    "sh",
    "sleep",
    "tail",
    "timeout",
    "touch",
)

# `docker run` behaves like a server that starts and ends, with HOLD only when it is stopped; DOCKER_LOG is what it
# prints. `docker stop` finds out whether the requests were drained before it.
DOCKER = """
case $1 in
  info) exit "${DOCKER_INFO:-0}" ;;
  image) [ "$3" = "$IMAGE_HERE" ] ;;
  run) printf '%s\\n' "$@" >"$CALLS"; printf '%b\\n' "$DOCKER_LOG"; sleep 1.2
    while [ -n "${HOLD-}" ] && [ ! -e "$CALLS.stopped" ]; do sleep 0.1; done; exit 1 ;;
  exec) [ "$2" = tritonmind ] && shift 2 && TRITONMIND_DRAIN_FILE=$CALLS.drain "$@" ;;
  stop)
    if [ -e "$CALLS.drain" ]; then set -- drained "$@"; fi
    printf '%s ' "$@" >"$CALLS.stopped" ;;
esac
"""


def executable(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in (*SYSTEM_TOOLS, "env"):
        found = shutil.which(tool)
        assert found, tool
        (folder / tool).symlink_to(found)
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    weights = tmp_path / "outer" / "ws" / "model_repository" / "tritonmind" / "1" / "weights"
    weights.mkdir(parents=True)
    (weights / "index.json").write_text(f'{{"format_version": 1, "image": "{IMAGE}", "version": "9.9.9"}}')
    (weights / "config.ini").write_text("[llama]\ntensor_para_size = 2\n")
    folder = tmp_path / "outer" / "ws"
    shutil.copy(SCRIPT, folder)
    return folder


@pytest.fixture
def run(bin_dir: Path, workspace: Path, tmp_path: Path) -> Run:
    """Run the workspace's copy of the script with only `bin_dir` on PATH."""

    def call(*arguments: str, script: Path = workspace / SCRIPT.name, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(bin_dir / "bash"), str(script), *arguments]
        variables = {"PATH": str(bin_dir), "CALLS": str(tmp_path / "calls"), "HOME": str(tmp_path), **env}
        return subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return call


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


RECORD = 'printf "%s\\n" "$0" "$@" >"$CALLS"'


def test_help_names_every_option(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for option in (
        "--docker",
        "--embedded",
        "--lib-dir",
        "--http",
        "--metrics",
        "--grpc-port",
        "--torch-index",
        "--venv",
    ):
        assert option in done.stdout
    for port in (
        embedded_server.DEFAULT_GRPC_PORT,
        embedded_server.DEFAULT_HTTP_PORT,
        embedded_server.DEFAULT_METRICS_PORT,
    ):
        assert str(port) in done.stdout
    assert run("-h").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--frobnicate"], "--frobnicate"),
        (["--grpc-port", "70000"], "70000"),
        (["--grpc-port", "http"], "--grpc-port=http"),
        (["--venv"], "--venv needs a value"),
        (["--docker", "--embedded"], "exclude each other"),
        (["one", "two"], "one and two"),
        (["--lib-dir", "absent"], "--lib-dir=absent"),
        (["--embedded=/x"], "--embedded takes no value, got '/x'"),
        (["--docker="], "--docker takes no value"),
        (["--help=serve"], "--help takes no value"),
        (["--http=web"], "--http=web is no port"),
        (["--http="], "--http= is no port"),
        (["--metrics=70000"], "--metrics=70000 is no port"),
    ],
)
def test_bad_usage_is_named(run: Run, arguments: list[str], named: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert "--help" in done.stderr


def test_folder_without_workspace_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("empty")
    assert done.returncode == 1
    assert "empty is no workspace" in done.stderr
    assert "index.json is missing" in done.stderr


def test_checkout_refuses_what_is_no_workspace_before_it_installs(run: Run, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    executable(checkout / "tools" / "setup_venv.sh", RECORD)
    (checkout / "setup.cfg").touch()
    shutil.copy(SCRIPT, checkout)
    done = run("absent", script=checkout / SCRIPT.name)
    assert done.returncode == 1
    assert "absent is no workspace" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_stopping_the_container_drains_it_first(bin_dir: Path, workspace: Path, tmp_path: Path) -> None:
    executable(bin_dir / "docker", DOCKER)
    env = {"PATH": str(bin_dir), "CALLS": str(tmp_path / "calls"), "HOME": str(tmp_path), "HOLD": "1"}
    env |= {"IMAGE_HERE": IMAGE, "DOCKER_LOG": "Started GRPCInferenceService at 0.0.0.0:33337"}
    command = [str(bin_dir / "bash"), str(workspace / SCRIPT.name), "--docker"]
    with subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout
        while "Ready" not in (line := script.stdout.readline()):
            assert line, "the script ended before it was ready"
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=10) == 0
    assert (tmp_path / "calls.stopped").read_text().split() == ["drained", "stop", "-t", "9", "tritonmind"]
    assert "--exit-timeout-secs=8" in calls(tmp_path)
    assert "--rm" in calls(tmp_path)


def test_serves_its_own_workspace_embedded_without_a_gpu(
    run: Run, bin_dir: Path, workspace: Path, tmp_path: Path
) -> None:
    executable(bin_dir / "tritonmind", RECORD)
    done = run("--http", "--metrics=4444", "--grpc_port", "5555")
    assert done.returncode == 0, done.stderr
    assert "No NVIDIA GPU" in done.stdout
    assert calls(tmp_path)[1:] == [
        *("serve", "triton_server", str(workspace), "--grpc-port", "5555", "--grpc-address", "127.0.0.1"),
        *("--http", "33338", "--metrics", "4444"),
    ]


def test_interpreter_is_looked_for_in_order(run: Run, bin_dir: Path, workspace: Path, tmp_path: Path) -> None:
    places = {
        "option": tmp_path / "option",
        "variable": tmp_path / "variable",
        "active": tmp_path / "active",
        "path": tmp_path,
        "parent": workspace.parent / ".venv",
    }
    for place in places.values():
        executable(place / "bin" / "tritonmind", RECORD)
    env = {"TRITONMIND_VENV": str(places["variable"]), "VIRTUAL_ENV": str(places["active"])}

    run("--venv", str(places["option"]), **env)
    assert calls(tmp_path)[0] == str(places["option"] / "bin" / "tritonmind")
    run(**env)
    assert calls(tmp_path)[0] == str(places["variable"] / "bin" / "tritonmind")
    run(VIRTUAL_ENV=env["VIRTUAL_ENV"])
    assert calls(tmp_path)[0] == str(places["active"] / "bin" / "tritonmind")
    run()
    assert calls(tmp_path)[0] == str(bin_dir / "tritonmind")
    (bin_dir / "tritonmind").unlink()
    run()
    assert calls(tmp_path)[0] == str(places["parent"] / "bin" / "tritonmind")


def test_no_interpreter_says_where_it_looked(run: Run) -> None:
    done = run("--embedded")
    assert done.returncode == 1
    for place in ("--venv", "TRITONMIND_VENV", "PATH", ".venv", "pip install"):
        assert place in done.stderr


def test_gpu_and_engine_choose_the_container(run: Run, bin_dir: Path, workspace: Path, tmp_path: Path) -> None:
    executable(bin_dir / "nvidia-smi", "exit 0")
    executable(bin_dir / "docker", DOCKER)
    done = run("--http", IMAGE_HERE=IMAGE, DOCKER_LOG="Started GRPCInferenceService at 0.0.0.0:33337")
    called = calls(tmp_path)
    assert called[0] == "run"
    assert called[called.index("--gpus") + 1] == '"device=0,1"'
    assert f"{workspace}:/workspace:ro" in called
    assert "127.0.0.1:33337:33337" in called
    assert "127.0.0.1:33338:33338" in called
    assert called.index(IMAGE) < called.index("tritonserver") < called.index("--allow-http=1")
    assert "tritonmind serve triton_client 127.0.0.1:33337" in done.stdout
    assert "the container ended" in done.stderr


def test_engine_that_does_not_answer(run: Run, bin_dir: Path, tmp_path: Path) -> None:
    executable(bin_dir / "nvidia-smi", "exit 0")
    executable(bin_dir / "docker", DOCKER)
    executable(bin_dir / "tritonmind", RECORD)
    done = run(DOCKER_INFO="1")
    assert "No Docker engine answers" in done.stdout
    assert calls(tmp_path)[0] == str(bin_dir / "tritonmind")
    forced = run("--docker", DOCKER_INFO="1")
    assert forced.returncode == 1
    assert "does not answer" in forced.stderr


def test_missing_image_names_the_build_command(run: Run, bin_dir: Path) -> None:
    executable(bin_dir / "docker", DOCKER)
    done = run("--docker", IMAGE_HERE="another")
    assert done.returncode == 1
    assert f"docker build -t {IMAGE} ." in done.stderr


def test_container_failure_shows_the_cause(run: Run, bin_dir: Path) -> None:
    executable(bin_dir / "docker", DOCKER)
    log = "I1 noise\\nE1 \\\"failed to load 'tritonmind' version 1: Internal: config.ini: no end_id\\\"\\nI1 noise"
    done = run("--docker", IMAGE_HERE=IMAGE, DOCKER_LOG=log)
    assert done.returncode == 1
    assert "config.ini: no end_id" in done.stderr
    assert "noise" not in done.stderr
    assert "Ready" not in done.stdout
