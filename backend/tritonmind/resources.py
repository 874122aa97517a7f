"""Where the files that ship beside the code are: workspace templates, the adapter, the service script."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from tritonmind.errors import ConfigError

SHARE = PurePosixPath("share/tritonmind")
_PACKAGE_PARENT = Path(__file__).resolve().parent.parent


def resource(relative: str) -> Path:
    """The shipped file `relative`, e.g. "backend/model.py" or "service_docker_up.sh".

    A package that runs from the checkout uses the checkout's files, so that code and templates are of one version; an
    installed one uses share/tritonmind of its own distribution. Raises ConfigError when the file is not there.
    """
    checkout = _PACKAGE_PARENT.parent
    if _PACKAGE_PARENT.name == "backend" and (checkout / "setup.cfg").is_file():
        path = checkout / relative
        if path.is_file():
            return path
        raise ConfigError(f"{path} is missing from the checkout")
    # Imported here: it costs more than the rest of this module, and the command line's --help does not need it.
    from importlib import metadata

    wanted = (SHARE / relative).parts
    try:
        files = metadata.distribution("tritonmind").files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.parts[-len(wanted) :] == wanted:
            path = Path(str(file.locate())).resolve()
            if path.is_file():
                return path
    raise ConfigError(f"{SHARE / relative} is not in this installation of tritonmind: reinstall the package")
