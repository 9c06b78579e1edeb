"""The wheel holds what the repository holds, and works where nothing else of the repository is."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tracked(*folders: str) -> list[str]:
    done = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    return next(folder.glob("turbotriton-*.whl"))


def test_wheel_has_every_tracked_module_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for path in tracked("src/turbotriton", "backend", "converter", "client", "quant", "model_repository"):
        if (ROOT / path).is_symlink():
            continue  # the links of src/turbotriton: their targets are listed themselves
        expected.add("turbotriton/" + path.removeprefix("src/turbotriton/"))
    assert expected
    assert not expected - names, f"missing in the wheel: {sorted(expected - names)[:5]}"
    extra = {name for name in names - expected if ".dist-info/" not in name}
    assert not extra, f"in the wheel and not in the repository: {sorted(extra)[:5]}"


def test_wheel_runs_from_a_plain_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import turbotriton, turbotriton.backend.engine.client, turbotriton.converter; print(turbotriton.__file__)"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "turbotriton" / "__init__.py")


def test_package_links_point_at_the_top_level_folders() -> None:
    for name in ("backend", "converter", "client", "quant", "model_repository"):
        link = ROOT / "src" / "turbotriton" / name
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == ROOT / name


def test_every_dependency_has_a_reason_and_a_pin() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("dependencies = [", 1)[1].split("\n]", 1)[0]
    lines = [line.strip() for line in block.splitlines() if line.strip()]
    assert all("  # " in line or ", # " in line for line in lines), "a dependency without its reason"
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    pins.add("triton")  # torch's: a pin of ours would contradict its CUDA builds
    for requirement in tomllib.loads(text)["project"]["dependencies"]:
        assert re.split(r"[\[<>=!~]", requirement)[0].lower() in pins, f"{requirement} has no pin in constraints.txt"
