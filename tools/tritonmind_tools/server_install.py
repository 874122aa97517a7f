"""Where the parts of the embedded Triton server lie, and whether this Python can run them.

The server is the one inside the `nvidia-pytriton` wheel. Its Python stub is linked against one libpython, starts
isolated (PYTHON* variables are ignored) and takes the site-packages of the first `python3` on PATH.

`python -m tritonmind_tools.server_install` says why an interpreter does not fit; it needs nothing installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tritonmind.errors import TritonmindError

STUB_NAME = "triton_python_backend_stub"
SUPPORTED_PYTHONS = ("3.10", "3.11", "3.12")
HOME_VARIABLE = "TRITONSERVER_HOME"


class ServerInstallError(TritonmindError):
    """The embedded server, or something that it needs, is not installed."""


@dataclass(frozen=True, kw_only=True)
class ServerInstall:
    """Files of a server that can run with this interpreter. `library_dirs` are for the dynamic linker."""

    executable: Path
    python_backend: Path
    stub: Path
    library_dirs: tuple[Path, ...]
    python_dir: Path

    def environment(self) -> dict[str, str]:
        """This process's environment, changed so that the server finds its libraries and this Python's packages."""
        env = dict(os.environ)
        inherited = env.get("LD_LIBRARY_PATH")
        env["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, self.library_dirs), *([inherited] if inherited else [])])
        env["PATH"] = os.pathsep.join([str(self.python_dir), env.get("PATH", os.defpath)])
        return env

    def lay_out_backends(self, directory: Path, name: str, model_py: Path) -> Path:
        """Make `directory` a backend directory holding the Python backend and `name`. Returns it.

        Everything is copied: the server refuses links that leave the directory.
        """
        python = directory / "python"
        shutil.copytree(self.python_backend, python, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(self.stub, python / STUB_NAME)
        (python / STUB_NAME).chmod(0o755)
        (directory / name).mkdir()
        shutil.copy(model_py, directory / name / "model.py")
        return directory


def find_server() -> ServerInstall:
    """Find the server of $TRITONSERVER_HOME, else of the `nvidia-pytriton` wheel.

    Raises ServerInstallError naming what is missing and how to get it.
    """
    check_interpreter()
    version = python_version()
    home = _server_home()
    stub = home / "python_backend_stubs" / version / STUB_NAME
    executable = home / "bin" / "tritonserver"
    for path in (executable, stub, home / "backends" / "python" / "libtriton_python.so"):
        if not path.is_file():
            raise ServerInstallError(
                f"{path} is missing: reinstall with `pip install --force-reinstall nvidia-pytriton==0.7.0`"
            )
    python_dir = Path(sys.executable).parent
    if not (python_dir / "python3").exists():
        raise ServerInstallError(f"no python3 beside {sys.executable}: run from a virtual environment (python -m venv)")
    check_numpy()
    libraries = (home.parents[1] / "nvidia_pytriton.libs", find_libpython().parent)
    return ServerInstall(
        executable=executable,
        python_backend=home / "backends" / "python",
        stub=stub,
        library_dirs=tuple(path for path in libraries if path.is_dir()),
        python_dir=python_dir,
    )


def check_interpreter() -> None:
    """Raise ServerInstallError unless this interpreter can hold the embedded server, installed or not."""
    version = python_version()
    if version not in SUPPORTED_PYTHONS:
        raise ServerInstallError(
            f"Python {version} runs this, but the embedded server has parts for {', '.join(SUPPORTED_PYTHONS)} only: "
            "make the virtual environment with one of those"
        )
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise ServerInstallError(
                f"Python {version} lacks the module {module} (Debian, Ubuntu: apt-get install python{version}-venv)"
            )
    find_libpython()


def python_version() -> str:
    """Major and minor version of the running interpreter, as the server names its stubs."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def find_libpython() -> Path:
    """The shared library of this interpreter, which the stub is linked against."""
    name = f"libpython{python_version()}.so.1.0"
    directories = [
        sysconfig.get_config_var("LIBDIR"),
        os.path.join(sys.base_prefix, "lib"),
        *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep),
        *_system_library_dirs(),
    ]
    for directory in filter(None, directories):
        path = Path(directory) / name
        if path.exists():
            return path
    raise ServerInstallError(
        f"{name} was not found: this Python has no shared library, which the server's stub needs. "
        f"On Debian and Ubuntu: apt-get install libpython{python_version()}. With pyenv: "
        f"PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install {python_version()}"
    )


def check_numpy() -> None:
    """Raise ServerInstallError unless a NumPy is installed that the stub survives."""
    remedy = 'install one with `pip install "numpy<2"`'
    try:
        version = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        raise ServerInstallError(f"NumPy is not installed: {remedy}") from None
    if int(version.partition(".")[0]) >= 2:
        raise ServerInstallError(
            f"NumPy {version} crashes the stub of the embedded server (2.51), which needs 1.x: {remedy}"
        )


def _server_home() -> Path:
    configured = os.environ.get(HOME_VARIABLE)
    if configured:
        return Path(configured)
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerInstallError(
            "the embedded Triton server is not installed: `pip install 'tritonmind[serve]'` "
            f"(package nvidia-pytriton), or set {HOME_VARIABLE} to an unpacked one"
        )
    return Path(spec.origin).parent / "tritonserver"


def _system_library_dirs() -> list[str]:
    multiarch = sysconfig.get_config_var("MULTIARCH")
    return [
        *([f"/usr/lib/{multiarch}", f"/lib/{multiarch}"] if multiarch else []),
        "/usr/local/lib",
        "/usr/lib64",
        "/usr/lib",
    ]


if __name__ == "__main__":
    try:
        check_interpreter()
    except ServerInstallError as error:
        sys.exit(str(error))
