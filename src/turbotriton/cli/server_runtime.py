"""Finds a tritonserver and sets up what it needs to run our doors.

    on PATH (the NGC image)       its own Python backend and stub
    else the server runtime       tritonserver 24.10 out of the PyPI package nvidia-pytriton, unpacked beside the environment
                                  (the package itself pins numpy < 2, so it is never installed)

The stub embeds one libpython: of the version that runs this command, and the system must have that library. It takes its packages
from the environment of the first Python on PATH. The stub of 24.10 misreads the arrays of numpy 2 (it was built before: every stride
is 0), so the server runtime brings a small environment with numpy 1.26; the doors' other packages come through TURBOTRITON_SITE.
"""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import turbotriton
from turbotriton.contract import env
from turbotriton.contract.errors import ServerError

__all__ = ["RUNTIME_VERSION", "ServerRuntime", "fetch_server_runtime", "find_server", "installed_server"]

logger = logging.getLogger(__name__)

RUNTIME_VERSION = "0.7.0"  # of nvidia-pytriton
SERVER_VERSION = "2.51.0 (24.10)"  # of tritonserver in it
STUB_NUMPY = "numpy==1.26.4"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_SERVER = Path("pytriton/tritonserver")
_LIBRARIES = Path("nvidia_pytriton.libs")


@dataclass(frozen=True, slots=True)
class ServerRuntime:
    """binary: tritonserver;  arguments: what every start needs;  environment: the whole environment of the process."""

    binary: Path
    arguments: tuple[str, ...]
    environment: dict[str, str]


def find_server() -> ServerRuntime:
    """Raises ServerError naming what is missing and how to get it."""
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return ServerRuntime(Path(on_path), (), _environment(()))
    _check_libpython()
    root = fetch_server_runtime()
    binary = root / _SERVER / "bin/tritonserver"
    environment = _environment((str(root / _LIBRARIES),), python_folder=root / "python/bin")
    return ServerRuntime(binary, (f"--backend-directory={root / 'backends'}",), environment)


def installed_server() -> str:
    """For people: which server `find_server` would give, without downloading it. Raises ServerError as `find_server`."""
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        version = Path(on_path).resolve().parents[1] / "TRITON_VERSION"  # in the NGC images
        return f"{on_path}, version {version.read_text().strip() if version.is_file() else 'unknown'}"
    _check_libpython()
    root = _runtime_root()
    if root.is_dir():
        return f"{root / _SERVER / 'bin/tritonserver'}, version {SERVER_VERSION}"
    return f"none installed; version {SERVER_VERSION} is downloaded from PyPI when it is first needed"


def _runtime_root() -> Path:
    return env.cache_dir() / f"server-runtime-{RUNTIME_VERSION}-py{_PYTHON}"


def fetch_server_runtime() -> Path:
    """The unpacked server runtime for this Python's stub; downloaded once (55 MB) with pip, then taken from the cache."""
    root = _runtime_root()
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        staged = Path(scratch) / "runtime"
        _unpack(_download(Path(scratch), f"nvidia-pytriton=={RUNTIME_VERSION}"), staged)
        _assemble_backends(staged)
        _make_stub_environment(_download(Path(scratch), STUB_NUMPY), staged / "python")
        try:
            staged.rename(root)
        except OSError:
            if not root.is_dir():  # else another process was first
                raise
    logger.info("server runtime unpacked into %s", root)
    return root


def _download(folder: Path, package: str) -> Path:
    """The wheel of one pinned package."""
    logger.info("downloading %s for the server runtime", package)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ServerError(
            f"no tritonserver on PATH, and {package} for the server runtime could not be downloaded: {last}. "
            "Run inside an NGC tritonserver image, or make the package index reachable"
        )
    return wheels[0]


def _unpack(wheel: Path, into: Path) -> None:
    """Only the server, its libraries, its Python backend and this Python's stub."""
    stubs = f"{_SERVER}/python_backend_stubs/"
    wanted = f"{stubs}{_PYTHON}/"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if not any(name.startswith(wanted) for name in names):
            raise ServerError(f"the server runtime has no stub for Python {_PYTHON}; use 3.11 or 3.12")
        for name in names:
            ours = name.startswith((f"{_SERVER}/", f"{_LIBRARIES}/"))
            if ours and (not name.startswith(stubs) or name.startswith(wanted)):
                archive.extract(name, into)
    (into / _SERVER / "bin/tritonserver").chmod(0o755)


def _assemble_backends(root: Path) -> None:
    """backends/python with the stub of this Python: tritonserver looks for both in one folder."""
    backend = root / "backends/python"
    shutil.copytree(root / _SERVER / "backends/python", backend)
    stub = backend / "triton_python_backend_stub"
    shutil.copy2(root / _SERVER / "python_backend_stubs" / _PYTHON / stub.name, stub)
    stub.chmod(0o755)


def _make_stub_environment(numpy_wheel: Path, folder: Path) -> None:
    """A virtual environment of this Python that holds numpy alone."""
    venv.create(folder, symlinks=True, with_pip=False)
    with zipfile.ZipFile(numpy_wheel) as archive:
        archive.extractall(folder / "lib" / f"python{_PYTHON}" / "site-packages")


def _check_libpython() -> None:
    name = f"libpython{_PYTHON}.so.1.0"
    if any((Path(folder) / name).exists() for folder in _libpython_folders()):
        return
    try:
        ctypes.CDLL(name)
    except OSError:
        raise ServerError(f"the stub needs {name}: install the system package libpython{_PYTHON} (Debian, Ubuntu)") from None


def _libpython_folders() -> list[str]:
    folder = sysconfig.get_config_var("LIBDIR")
    return [folder] if folder and sysconfig.get_config_var("Py_ENABLE_SHARED") else []


def _environment(library_folders: Iterable[str], python_folder: Path | None = None) -> dict[str, str]:
    """Ours, plus: the stub's Python first on PATH, where our package and its dependencies lie (the 24.10 stub ignores
    PYTHONPATH), and the interpreter for the engine process."""
    environment = env.environment()

    def prepend(name: str, parts: Iterable[str]) -> None:
        old = [part for part in environment.get(name, "").split(os.pathsep) if part]
        environment[name] = os.pathsep.join(dict.fromkeys([*parts, *old]))

    prepend("PATH", [str(python_folder or Path(sys.executable).parent)])
    prepend("LD_LIBRARY_PATH", [*library_folders, *_libpython_folders()])
    prepend("TURBOTRITON_SITE", [str(Path(turbotriton.__file__).parents[1]), sysconfig.get_path("purelib")])
    environment.setdefault("TURBOTRITON_PYTHON", sys.executable)
    return environment


def main() -> int:
    """`python -m turbotriton.cli.server_runtime`: makes sure that a tritonserver is at hand, and says which."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(f"tritonserver: {find_server().binary}")
    except ServerError as error:
        print(f"turbotriton: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
