"""The Python blocks of the documentation run as they stand; a folder of that name stands for the model that they name."""

import json
import re
import warnings
from pathlib import Path

import pytest

from turbotriton.contract.chat_templates import listed_template_names, read_template_config
from turbotriton.demo import checkpoint_path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "internlm").mkdir()
    (tmp_path / "internlm/internlm2-chat-1_8b").symlink_to(checkpoint_path())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TURBOTRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TURBOTRITON_SESSION_LEN", "256")  # a KV cache for a test


@pytest.mark.parametrize("page", ["pipeline.md", "chat-templates.md"])
@pytest.mark.usefixtures("model_folder")
def test_python_blocks_run_in_their_order(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(page, "python")
    assert code
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no CUDA device")
        for number, block in enumerate(code):
            exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    said = capsys.readouterr().out
    if page == "pipeline.md":
        assert "5" in said.splitlines()[0]


def test_template_blocks_are_what_they_say() -> None:
    (text,) = blocks("chat-templates.md", "json")
    assert read_template_config(text).meta_instruction == json.loads(text)["meta_instruction"]
    (listed,) = blocks("chat-templates.md", "console")
    assert listed.splitlines()[1:4] == listed_template_names()[:3]
