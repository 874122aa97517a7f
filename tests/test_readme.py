"""What the README shows is what works: its client, its options, its links."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workspaces import tiny_workspace
from tritonmind.request_fields import INPUTS, OUTPUTS
from tritonmind_tools.embedded_server import EmbeddedServer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"]


def client_code() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 1
    return str(blocks[0])


def test_client_is_short_and_needs_tritonclient_only() -> None:
    code = client_code()
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported - sys.stdlib_module_names == {"numpy", "tritonclient"}


@pytest.mark.server
def test_client_streams_an_answer(tmp_path: Path) -> None:
    with EmbeddedServer(tiny_workspace(tmp_path), grpc_port=0, log_path=tmp_path / "server.log") as server:
        command = [sys.executable, "-c", client_code(), server.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout
        client = client_code().replace('"max_tokens": 64', '"max_tokens": 0')
        refused = subprocess.run(
            [sys.executable, "-c", client, server.address], capture_output=True, text=True, timeout=60
        )
        assert refused.returncode != 0
        assert "max_tokens" in refused.stderr


def test_every_option_of_the_script_is_in_the_table() -> None:
    done = subprocess.run(["bash", str(ROOT / "service_docker_up.sh"), "--help"], capture_output=True, text=True)
    options = set(re.findall(r"^ +(?:-h, )?(--[a-z-]+)", done.stdout, re.M)) - {"--help"}
    assert options
    for option in options:
        assert re.search(rf"^\|.*`{option}[ `]", README, re.M), f"{option} is not in README's table"


def test_tensors_of_the_table_exist() -> None:
    interface = README.partition("## The interface")[2].partition("\n## ")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", interface, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert names <= {field.name for field in INPUTS}
    outputs = interface.partition("Outputs:")[2].partition("Text, ids")[0]
    assert set(re.findall(r"`(\w+)`", outputs)) - {"stop", "length", "cancelled"} == {field.name for field in OUTPUTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_of_documents_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
    for path in re.findall(r"`((?:backend|tools|tests|model_repository|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_modules_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    package, tools = ROOT / "backend" / "tritonmind", ROOT / "tools" / "tritonmind_tools"
    for dotted in re.findall(r"`tritonmind\.([a-z_.]+?)(?:\.[a-z_]+)?`", text):
        assert list(package.glob(dotted.replace(".", "/") + "*")), f"no tritonmind.{dotted}"
    for path in re.findall(r"`((?:engine|kernels|models|bench)/\w+\.py)`", text):
        assert (package / path).is_file() or (tools / path).is_file(), f"no {path}"
    rows = "".join(re.findall(r"^\| (?:`backend/tritonmind/`)? ?\| .*", text.partition("## Packages")[2], re.M))
    modules = re.findall(r"`(\w+)`", rows)
    assert len(modules) > 20
    for module in modules:
        assert (package / f"{module}.py").is_file(), f"no {module}.py"
