"""Who imports whom, read from the syntax tree: imports inside functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BACKEND = ROOT / "backend"
TOOLS = ROOT / "tools"
MAX_FILE_LINES = 450
EXTENSIONS = {".py", ".sh", ".cfg", ".toml", ".md", ".pbtxt", ".ini"}

# What may be imported from outside the package, by folder; the standard library is always allowed.
KERNEL_LIBRARIES = {"torch", "triton", "numpy"}
WEB_FRAMEWORKS = {"aiohttp", "fastapi", "flask", "gradio", "httpx", "starlette", "uvicorn"}
SERVER_API = "triton_python_backend_utils"

# Within the package each folder may import itself, what stands here, and the modules below all folders.
FOLDERS_BELOW = {
    "checkpoints": {"kernels"},
    "kernels": set(),
    "layers": {"kernels"},
    "models": {"layers", "kernels"},
    "engine": {"models", "layers", "kernels", "checkpoints"},
}
FLAT_MODULES_BELOW_ALL = {"config", "errors", "messages"}
# The adapter's side of the package: what the process of model.py may hold. None of it imports torch.
ADAPTER_MODULES = {
    "tritonmind.chat_template",
    "tritonmind.config",
    "tritonmind.engine",
    "tritonmind.engine.client",
    "tritonmind.engine.launch",
    "tritonmind.errors",
    "tritonmind.live_request",
    "tritonmind.messages",
    "tritonmind.metrics",
    "tritonmind.request_fields",
    "tritonmind.sampling_params",
    "tritonmind.serving",
    "tritonmind.sessions",
    "tritonmind.supervisor",
    "tritonmind.text_stream",
    "tritonmind.tokenizer",
    "tritonmind.workspace",
}


def module_name(path: Path) -> str:
    root = BACKEND if path.is_relative_to(BACKEND) else TOOLS
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = sorted([*BACKEND.rglob("*.py"), *TOOLS.rglob("*.py")])
MODULES = {module_name(path): path for path in SOURCES}


def imported_names(path: Path) -> set[str]:
    """Absolute dotted names that a file imports anywhere; `from a import b` counts as a.b where that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(submodules & MODULES.keys() or {node.module})
    return found


IMPORTS = {name: imported_names(path) for name, path in MODULES.items()}


def modules_in(folder: str) -> list[str]:
    return [name for name in MODULES if name == folder or name.startswith(folder + ".")]


def outside(name: str) -> set[str]:
    """Top-level packages imported from neither the standard library nor this project."""
    own = {"tritonmind", "tritonmind_tools"}
    return {full.partition(".")[0] for full in IMPORTS[name]} - own - sys.stdlib_module_names


def test_sources_are_found() -> None:
    assert {"model", "tritonmind.config", "tritonmind.engine", "tritonmind_tools.cli"} <= MODULES.keys()


@pytest.mark.parametrize("folder", FOLDERS_BELOW)
def test_folders_import_downwards(folder: str) -> None:
    allowed = {folder} | FOLDERS_BELOW[folder]
    for name in modules_in(f"tritonmind.{folder}"):
        for target in IMPORTS[name]:
            parts = target.split(".")
            if parts[0] == "tritonmind_tools":
                pytest.fail(f"{name} imports {target}: the package must not know the tools")
            if parts[0] == "tritonmind" and len(parts) > 1 and parts[1] in FOLDERS_BELOW:
                assert parts[1] in allowed, f"{name} imports {target}: {folder} may import {sorted(allowed)} only"


def test_kernels_know_torch_and_triton_only() -> None:
    for name in modules_in("tritonmind.kernels"):
        assert outside(name) <= KERNEL_LIBRARIES, f"{name} imports {outside(name) - KERNEL_LIBRARIES}"
        upwards = {target for target in IMPORTS[name] if target.startswith("tritonmind.")} - set(
            modules_in("tritonmind.kernels")
        )
        assert not upwards, f"{name} imports {upwards}: kernels see tensors and numbers, nothing else"


@pytest.mark.parametrize("folder", ["checkpoints", "layers", "models", "engine"])
def test_engine_and_below_know_no_server_and_no_web(folder: str) -> None:
    for name in modules_in(f"tritonmind.{folder}"):
        assert not outside(name) & (WEB_FRAMEWORKS | {SERVER_API, "tritonclient"}), f"{name} imports {outside(name)}"


def test_contracts_import_only_each_other() -> None:
    for flat in FLAT_MODULES_BELOW_ALL:
        targets = {target for target in IMPORTS[f"tritonmind.{flat}"] if target.startswith("tritonmind")}
        allowed = {f"tritonmind.{other}" for other in FLAT_MODULES_BELOW_ALL}
        assert targets <= allowed, f"tritonmind.{flat} imports {targets - allowed}"


def test_only_the_adapter_knows_the_server_api() -> None:
    for name in MODULES:
        if SERVER_API in IMPORTS[name]:
            assert name == "model", f"{name} imports {SERVER_API}"


def test_adapter_imports() -> None:
    own = {target for target in IMPORTS["model"] if target.startswith("tritonmind")}
    assert own <= ADAPTER_MODULES, f"model.py imports {own - ADAPTER_MODULES}"
    assert not outside("model") & {"torch", "triton", "transformers"}


def test_package_does_not_know_the_tools() -> None:
    for name in modules_in("tritonmind"):
        assert not any(target.startswith("tritonmind_tools") for target in IMPORTS[name]), name


def test_clients_need_their_protocol_only() -> None:
    allowed = {
        "api_client": {"httpx", "httpx_sse"},
        "conversation": set(),
        "console": set(),
        "console_transport": set(),
        "gradio_app": {"fastapi", "gradio", "starlette", "uvicorn"},
        "triton_client": {"numpy", "tritonclient"},
    }
    for folder, libraries in allowed.items():
        for name in modules_in(f"tritonmind_tools.{folder}"):
            assert outside(name) <= libraries, f"{name} imports {outside(name) - libraries}"


def test_a_page_over_a_server_loads_no_torch() -> None:
    """Gradio itself, which takes seconds to import, is a stand-in here."""
    web = ["fastapi", "gradio", "starlette", "starlette.datastructures", "starlette.routing", "starlette.types"]
    web += ["uvicorn"]
    code = f"import sys\nfrom unittest.mock import MagicMock\nsys.modules.update((n, MagicMock()) for n in {web})\n"
    code += "import tritonmind_tools.gradio_app.serve, httpx_sse, tritonclient.grpc"
    loaded = loaded_after(code, BACKEND, TOOLS)
    assert "tritonmind_tools.gradio_app.page" in loaded and not loaded & {"torch", "transformers"}


def test_no_import_cycles() -> None:
    graph = {name: {target for target in IMPORTS[name] if target in MODULES and target != name} for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError naming the cycle


def loaded_after(code: str, *paths: Path) -> set[str]:
    """Names of all modules loaded after running `code` in a fresh interpreter with `paths` in front of sys.path."""
    script = f"import sys\nsys.path[:0] = {[str(path) for path in paths]!r}\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.splitlines())


def test_help_loads_nothing_heavy() -> None:
    code = "import contextlib, io\nfrom tritonmind_tools.cli import main\n"
    code += "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['--help'])"
    loaded = loaded_after(code, BACKEND, TOOLS)
    assert "tritonmind_tools.cli" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "tritonclient", "grpc", "jinja2", "rich"}


def test_adapter_loads_no_torch() -> None:
    loaded = loaded_after("import model", BACKEND, ROOT / "tests" / "fakes")
    assert "model" in loaded
    assert not loaded & {"torch", "triton", "transformers"}


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def test_no_file_outgrows_its_room() -> None:
    for path in tracked_files():
        if path.suffix == ".py":
            lines = len(path.read_text().splitlines())
            assert lines <= MAX_FILE_LINES, f"{path.relative_to(ROOT)} has {lines} lines, more than {MAX_FILE_LINES}"


def test_no_path_of_a_machine() -> None:
    """Absolute paths of one person's or one machine's folders; those of images and standard systems are fine."""
    machine = re.compile(r"(?<![\w.$}~-])/(?:home|root|Users|work|mnt|data|scratch)/\w")
    for path in tracked_files():
        if path.suffix in EXTENSIONS and path != Path(__file__):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not machine.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
