"""Markers that skip themselves, chance that repeats itself, and where the test assets are. Nothing else belongs here."""

import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

# the same examples in every run, however slow the machine is
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By markers alone: a folder or file that is called as one is no marker."""
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("gpu") and num_gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("multigpu") and num_gpus < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))
    items[:] = _servers_among_others(items)


def _servers_among_others(items: list[pytest.Item]) -> list[pytest.Item]:
    """After each file that starts servers two that do not, while there are both: of workers side by side one waits while others compute."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting, computing = [], []
    for of_file in files.values():
        starts_servers = any(item.get_closest_marker(name) for item in of_file for name in ("e2e", "browser"))
        (waiting if starts_servers else computing).append(of_file)
    ordered: list[pytest.Item] = []
    while waiting or computing:
        for of_file in (*waiting[:1], *computing[:2]):
            ordered += of_file
        del waiting[:1], computing[:2]
    return ordered


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts torch's own generators, of every device, at the same number."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assets() -> Path:
    """Released configs, tokenizers and a small trained model: TURBOTRITON_TEST_ASSETS, default ../shared from the root."""
    folder = Path(os.environ.get("TURBOTRITON_TEST_ASSETS") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"test assets absent: {folder} is no folder (set TURBOTRITON_TEST_ASSETS)")
    return folder
