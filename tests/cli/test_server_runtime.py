"""The server runtime is assembled from a wheel of the real one's shape; what is missing is named with its remedy."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from turbotriton.cli import server_runtime
from turbotriton.contract.errors import ServerError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SERVER = "pytriton/tritonserver"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of files with small wheels; pip is pointed at it and at nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(
        folder / f"nvidia_pytriton-{server_runtime.RUNTIME_VERSION}-py3-none-any.whl",
        {
            f"{SERVER}/bin/tritonserver": "the server",
            f"{SERVER}/backends/python/libtriton_python.so": "the backend",
            f"{SERVER}/python_backend_stubs/{PYTHON}/triton_python_backend_stub": "the stub of this Python",
            f"{SERVER}/python_backend_stubs/3.8/triton_python_backend_stub": "another Python's stub",
            "nvidia_pytriton.libs/libb64.so": "a library",
            "pytriton/client.py": "not needed",
        },
    )
    write_wheel(folder / "numpy-1.26.4-py3-none-any.whl", {"numpy/__init__.py": "__version__ = 'of the stub'"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TURBOTRITON_CACHE", str(tmp_path / "cache"))
    return folder


def write_wheel(path: Path, files: dict[str, str]) -> None:
    name, version = path.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_backend_folder_holds_the_stub_of_this_python(index: Path) -> None:
    root = server_runtime.fetch_server_runtime()
    stub = root / "backends/python/triton_python_backend_stub"
    assert stub.read_text() == "the stub of this Python"
    assert os.access(stub, os.X_OK)
    assert (root / "backends/python/libtriton_python.so").exists()
    assert os.access(root / SERVER / "bin/tritonserver", os.X_OK)
    assert (root / "nvidia_pytriton.libs/libb64.so").exists()
    assert not (root / "pytriton/client.py").exists()
    assert not (root / SERVER / "python_backend_stubs/3.8").exists()


def test_stub_environment_has_its_own_numpy(index: Path) -> None:
    python = server_runtime.fetch_server_runtime() / "python/bin/python3"
    command = [str(python), "-I", "-c", "import numpy; print(numpy.__version__)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "of the stub\n"


def test_runtime_is_fetched_once(index: Path) -> None:
    first = server_runtime.fetch_server_runtime()
    for wheel in index.glob("*.whl"):
        wheel.unlink()
    assert server_runtime.fetch_server_runtime() == first


def test_failed_fetch_leaves_nothing_and_names_the_package(index: Path, tmp_path: Path) -> None:
    for wheel in index.glob("numpy*.whl"):
        wheel.unlink()
    with pytest.raises(ServerError, match=r"numpy==1\.26\.4 for the server runtime could not be downloaded"):
        server_runtime.fetch_server_runtime()
    assert list((tmp_path / "cache").iterdir()) == []


def test_server_on_path_is_preferred(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "bin/tritonserver"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent))
    runtime = server_runtime.find_server()
    assert runtime.binary == binary
    assert runtime.arguments == ()
    assert not (tmp_path / "cache").exists()


def test_environment_leads_the_stub_to_the_package_and_to_this_python(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_runtime, "_check_libpython", lambda: None)  # the machine's libpython is not what is tested
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("TURBOTRITON_PYTHON", raising=False)
    runtime = server_runtime.find_server()
    root = server_runtime.fetch_server_runtime()
    assert runtime.arguments == (f"--backend-directory={root / 'backends'}",)
    assert runtime.environment["PATH"].split(":")[0] == str(root / "python/bin")
    assert str(root / "nvidia_pytriton.libs") in runtime.environment["LD_LIBRARY_PATH"].split(":")
    assert runtime.environment["TURBOTRITON_PYTHON"] == sys.executable
    code = "import turbotriton, tokenizers; print(turbotriton.__file__)"
    site = runtime.environment["TURBOTRITON_SITE"]
    command = [sys.executable, "-S", "-c", f"import site; [site.addsitedir(f) for f in {site.split(':')!r}]; {code}"]
    assert subprocess.run(command, capture_output=True, text=True, cwd="/", check=False).stdout.endswith("__init__.py\n")


def test_missing_libpython_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_runtime, "_PYTHON", "3.99")
    with pytest.raises(ServerError, match=r"libpython3\.99\.so\.1\.0: install the system package libpython3\.99 "):
        server_runtime._check_libpython()


def test_python_without_a_stub_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_runtime, "_PYTHON", "3.99")
    with pytest.raises(ServerError, match=r"no stub for Python 3\.99; use 3\.11 or 3\.12"):
        server_runtime.fetch_server_runtime()
