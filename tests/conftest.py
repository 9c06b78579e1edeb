"""Markers that skip themselves, and where the test assets are. Nothing else belongs here."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if "gpu" in item.keywords and num_gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "multigpu" in item.keywords and num_gpus < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """Released configs, tokenizers and a small trained model: TURBOTRITON_TEST_ASSETS, default ../shared from the root."""
    folder = Path(os.environ.get("TURBOTRITON_TEST_ASSETS") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"test assets absent: {folder} is no folder (set TURBOTRITON_TEST_ASSETS)")
    return folder
