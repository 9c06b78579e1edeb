"""A MODEL_PATH that is no local path is a hub id: downloaded with progress, named when it cannot be."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from huggingface_hub import constants as hub_constants
from tests.cli.hub_stub import HubStub, files_of
from tests.cli.process import turbotriton

from turbotriton import GenerationConfig, PytorchEngineConfig, pipeline
from turbotriton.cli import running_server
from turbotriton.cli.main import main
from turbotriton.contract.errors import CheckpointError, ServerError
from turbotriton.converter.hub import local_model_path
from turbotriton.demo import checkpoint_path

EXTRA = {"pytorch_model.bin": b"the same weights again", "picture.png": b"a picture"}


@pytest.fixture
def hub() -> Iterator[HubStub]:
    with HubStub("somebody/demo", files_of(checkpoint_path()) | EXTRA) as stub:
        yield stub


def test_chat_takes_a_hub_id(hub: HubStub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "TURBOTRITON_CACHE": str(tmp_path / "cache")}
    options = ["--revision", "v2", "--download-dir", str(tmp_path / "downloads"), "--max-batch-size", "1", "--top-k", "1"]
    done = turbotriton("chat", "somebody/demo", *options, "--once", "What is 2 + 3?", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "5" in done.stdout
    assert "100%" in done.stderr  # of the progress bar
    assert "/api/models/somebody/demo/revision/v2" in hub.paths
    assert list((tmp_path / "downloads").rglob("model.safetensors"))


def test_convert_takes_a_hub_id(hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(hub, monkeypatch)
    workspace = tmp_path / "workspace"
    arguments = ["convert", "demo", "somebody/demo", "--dst-path", str(workspace), "--download-dir", str(tmp_path / "downloads")]
    assert main(arguments) == 0
    assert (workspace / "model_repository/demo/config.pbtxt").is_file()
    assert not [path for path in hub.paths if path.endswith((".bin", ".png"))]


def test_plan_takes_a_hub_id_and_leaves_the_weights_there(
    hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(hub, monkeypatch)
    assert main(["plan", "somebody/demo", "--gpu", "h200", "--download-dir", str(tmp_path)]) == 0
    assert "KV cache" in capsys.readouterr().out
    assert not [path for path in hub.paths if path.endswith((".safetensors", ".bin", "tokenizer.json"))]


def test_pipeline_takes_a_hub_id(hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(hub, monkeypatch)
    monkeypatch.setenv("TURBOTRITON_CACHE", str(tmp_path / "cache"))
    for number, given in enumerate(("the call", "the config")):
        where = {"revision": "v2", "download_dir": str(tmp_path / str(number))}
        more = where if given == "the call" else {"backend_config": PytorchEngineConfig(**where)}
        with pipeline("somebody/demo", **more) as pipe:
            assert "5" in pipe("What is 2 + 3?", GenerationConfig(top_k=1)).text
        assert list((tmp_path / str(number)).rglob("model.safetensors"))
    assert "/api/models/somebody/demo/revision/v2" in hub.paths


@pytest.mark.parametrize("command", ["calibrate", "auto_awq", "smooth_quant"])
def test_lite_takes_a_hub_id(hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    use(hub, monkeypatch)
    few = ["--device", "cpu", "--calib-samples", "1", "--calib-seqlen", "16", "--work-dir", str(tmp_path / "work")]
    assert main(["lite", command, "somebody/demo", "--download-dir", str(tmp_path / "downloads"), *few]) == 0
    assert any((tmp_path / "work").iterdir())
    assert list((tmp_path / "downloads").rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("command", "options", "name"), [("api_server", [], "demo"), ("gradio", ["--model-name", "sums"], "sums")]
)
def test_what_serves_a_model_takes_a_hub_id(
    hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: list[str], name: str
) -> None:
    use(hub, monkeypatch)
    served: list[set[str]] = []

    def record(workspace: Path, *unused: object) -> NoReturn:
        served.append({path.name for path in (workspace / "model_repository").iterdir()})
        raise ServerError("far enough")

    monkeypatch.setattr(running_server, "running_server", record)
    assert main(["serve", command, "somebody/demo", "--download-dir", str(tmp_path), *options]) == 1
    assert served == [{name, "turbomind", "preprocessing", "postprocessing"}]


@pytest.mark.parametrize("command", ["api_server", "gradio"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["localhost:1", "--model-name", "x"], "--model-name is for a model that is served from here; localhost:1 runs already"),
        (["localhost:1", "--revision", "v2"], "--revision is for a model that is served from here"),
        (["/no/such", "--model-format", "hf"], "/no/such: is no folder, and no hub id"),
        (["WORKSPACE", "--model-name", "x"], "--model-name is 'x', but .* is a workspace"),
        (["FILE"], "is no folder; give a workspace"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    command: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "workspace/model_repository/m/1/weights"
    weights.mkdir(parents=True)
    (weights / "config.ini").touch()
    (tmp_path / "file").touch()
    paths = {"WORKSPACE": str(tmp_path / "workspace"), "FILE": str(tmp_path / "file")}
    assert main(["serve", command, *(paths.get(argument, argument) for argument in arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, line)


def test_offline_is_one_line_and_code_2(tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = turbotriton("chat", "somebody/demo", environment=environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search("somebody/demo: is no local folder.*refused", line)


def use(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client reads HF_ENDPOINT when it is imported."""
    monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_downloaded_model_needs_no_hub_any_more(hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(hub, monkeypatch)
    first = local_model_path("somebody/demo", download_dir=tmp_path)
    assert files_of(first).keys() == files_of(checkpoint_path()).keys()
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    assert local_model_path("somebody/demo", download_dir=tmp_path) == first


def test_torchs_own_format_is_taken_where_there_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubStub("somebody/old", {"config.json": b"{}", **EXTRA}) as hub:
        use(hub, monkeypatch)
        assert files_of(local_model_path("somebody/old", download_dir=tmp_path)).keys() == {"config.json", "pytorch_model.bin"}


@pytest.mark.parametrize(
    ("repo_id", "revision", "message"),
    [
        ("somebody/other", None, "the hub knows no such model"),
        ("somebody/demo", "v9", "it has no revision 'v9'"),
        ("somebody/gated", None, "HF_TOKEN"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(
    hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_id: str, revision: str | None, message: str
) -> None:
    use(hub, monkeypatch)
    with pytest.raises(CheckpointError, match=message) as caught:
        local_model_path(repo_id, revision=revision, download_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a/b/c", "/no/where", "../nowhere", "with space", "owner/"])
def test_what_is_neither_a_folder_nor_an_id_is_not_asked_for(path: str) -> None:
    with pytest.raises(CheckpointError, match="no hub id"):
        local_model_path(path)
