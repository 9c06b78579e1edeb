"""Imports go down only: the table below is the architecture, read from every module's imports with `ast`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "turbotriton"

#: unit -> units it may import (besides itself). The most specific prefix of a module's name is its unit.
ALLOWED = {
    "contract": (),
    "text": ("contract",),
    "demo": ("contract",),
    "backend.ops": ("contract",),
    "backend.scheduling": ("contract",),
    "quant": ("contract", "backend.ops", "backend.model", "converter"),
    "converter": ("contract", "backend.ops", "text"),
    "backend.model": ("contract", "backend.ops"),
    "backend.runner": ("contract", "backend.ops", "backend.model", "backend.scheduling"),
    "backend.engine": ("contract", "backend.scheduling", "backend.runner"),
    "backend.tritonserver": ("contract", "text", "backend.engine"),
    "backend.pipeline": ("contract", "text", "backend.scheduling", "backend.runner", "backend.engine", "converter"),
    "backend": ("contract",),
    "client": ("contract", "text"),
    "cli": ("contract", "text", "demo", "backend", "converter", "client", "quant"),
    "api": ("contract", "backend", "converter", "client", "cli"),
    "serving": ("contract", "backend", "client", "cli"),
}

#: third-party package -> the only units that may import it.
ONLY_IN = {
    "triton": ("backend.ops",),
    "torch": ("backend.ops", "backend.model", "backend.runner", "converter", "quant", "demo"),
    "transformers": ("converter", "quant", "demo"),
    "safetensors": ("converter", "quant", "demo"),
    "tokenizers": ("text", "converter", "quant", "demo", "backend.tritonserver"),
    "triton_python_backend_utils": ("backend.tritonserver",),
    "tritonclient": ("client",),
    "grpc": ("client",),
    "gradio": ("client",),
    "fastapi": ("client",),
    "msgpack": ("backend.engine",),
    "huggingface_hub": ("converter",),
    "llguidance": ("backend.engine",),
    "socket": ("backend.engine", "client", "cli", "serving"),
}

#: module -> the only file of the package that may use it for the environment.
ENVIRONMENT_READER = "turbotriton.contract.env"


def modules() -> list[tuple[str, Path]]:
    found = [(f"turbotriton.{name}", PACKAGE / f"{name}.py") for name in ("api", "serving")]
    folders = ["contract", "text", "demo", "cli", "backend", "converter", "client", "quant"]
    for folder in folders:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            found.append((".".join(("turbotriton", *parts)).removesuffix(".__init__"), path))
    return found


def unit_of(name: str) -> str | None:
    """The unit that a module of ours belongs to, or None."""
    inside = name.removeprefix("turbotriton.")
    if inside == name:
        return None
    matches = [unit for unit in ALLOWED if inside == unit or inside.startswith(unit + ".")]
    return max(matches, key=len) if matches else inside.split(".")[0]


def imports_of(name: str, path: Path) -> set[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")
                anchor = anchor[: len(anchor) - node.level + 1]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" if not node.module else base for alias in node.names)
    return found


MODULES = modules()


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_go_down_only(name: str, path: Path) -> None:
    unit = unit_of(name)
    assert unit in ALLOWED, f"{name} belongs to no layer"
    for imported in imports_of(name, path):
        target = unit_of(imported)
        if target is not None and imported not in ("turbotriton", "turbotriton.__version__"):
            allowed = (unit, *ALLOWED[unit])
            assert any(target == one or target.startswith(one + ".") for one in allowed), f"{name} imports {imported}"
        top = imported.split(".")[0]
        if top in ONLY_IN:
            assert any(unit == one or unit.startswith(one + ".") for one in ONLY_IN[top]), f"{name} imports {imported}"


def test_only_one_op_folder_touches_triton() -> None:
    users = {name for name, path in MODULES if any(i.split(".")[0] == "triton" for i in imports_of(name, path))}
    assert users
    assert all(name.startswith("turbotriton.backend.ops.kernels.") for name in users), users


def test_the_environment_is_read_in_one_place() -> None:
    for name, path in MODULES:
        if name != ENVIRONMENT_READER:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                    raise AssertionError(f"{name}:{node.lineno} reads the environment; contract/env.py is the place")


@pytest.mark.parametrize("door", sorted(path.stem for path in (ROOT / "backend" / "tritonserver").glob("*_door.py")))
def test_door_and_all_it_imports_leave_torch_and_transformers_alone(door: str) -> None:
    """The table allows doors the engine's client, whose unit may import torch: what really gets imported decides."""
    code = f"""
import importlib, sys, unittest.mock
sys.modules["triton_python_backend_utils"] = unittest.mock.MagicMock()
importlib.import_module("turbotriton.backend.tritonserver.{door}").TritonPythonModel
print(sorted({{"torch", "transformers", "triton", "tritonclient"}} & set(sys.modules)))
"""
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_root_entry_shadows_a_package() -> None:
    """Python puts the working directory first on sys.path in tritonserver's stubs."""
    shadowing = {"triton", "torch", "utils", "numpy", "tokenizers"}
    assert not {path.stem for path in ROOT.iterdir()} & shadowing
