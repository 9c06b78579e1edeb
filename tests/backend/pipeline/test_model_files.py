"""From a path to weights and tokenizer: workspaces as they are, checkpoints through the cache."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest

from turbotriton import PytorchEngineConfig, Response, TurbomindEngineConfig, pipeline
from turbotriton.backend.pipeline import model_files
from turbotriton.backend.pipeline.model_files import open_model
from turbotriton.backend.pipeline.options import EngineOptions, engine_options
from turbotriton.cli.main import main
from turbotriton.contract.errors import CheckpointError, WorkspaceError
from turbotriton.contract.ini import read_workspace_config
from turbotriton.demo import checkpoint_path

OPTIONS = engine_options(TurbomindEngineConfig())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBOTRITON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/workspaces"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that were converted."""
    made: list[Path] = []
    original = model_files._convert

    def convert(path: Path, workspace: Path, options: EngineOptions) -> None:
        made.append(path)
        original(path, workspace, options)

    monkeypatch.setattr(model_files, "_convert", convert)
    return made


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "workspace"
    assert main(["convert", "qwen", str(checkpoint_path()), "--dst-path", str(folder)]) == 0
    return folder


def session_len(weights: Path) -> int:
    return read_workspace_config(weights / "config.ini").llama.session_len


def copy_of_demo(folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint_path(), folder))


def test_a_checkpoint_is_converted_once_and_again_when_it_has_changed(
    tmp_path: Path, cache: Path, conversions: list[Path]
) -> None:
    checkpoint = copy_of_demo(tmp_path / "model")
    for _ in range(2):
        with open_model(checkpoint, OPTIONS) as files:
            assert (files.weights / "config.ini").is_file()
    assert len(conversions) == 1
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    with open_model(checkpoint, OPTIONS) as files:
        assert session_len(files.weights) == 512
    (checkpoint / "model.safetensors").touch()
    with open_model(checkpoint, OPTIONS):
        pass
    assert len(conversions) == 3


def test_a_named_template_sets_the_session_len_and_a_guessed_one_does_not(tmp_path: Path, cache: Path) -> None:
    checkpoint = copy_of_demo(tmp_path / "qwen-like")
    with open_model(checkpoint, OPTIONS) as files:
        assert files.template_name == "qwen"
        assert session_len(files.weights) == 2048  # max_position_embeddings
    with open_model(checkpoint, engine_options(TurbomindEngineConfig(model_name="yi"))) as files:
        assert files.template_name == "yi"
        assert session_len(files.weights) == 2048 + 8


def test_old_workspaces_leave_the_cache_but_for_those_in_use(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "KEPT_WORKSPACES", 1)
    checkpoints = [copy_of_demo(tmp_path / f"model{i}") for i in range(3)]
    with open_model(checkpoints[0], OPTIONS) as used:
        with open_model(checkpoints[1], OPTIONS) as unused:
            pass
        with open_model(checkpoints[2], OPTIONS) as newest:
            assert used.weights.is_dir()
            assert not unused.weights.is_dir()
            assert newest.weights.is_dir()
    with open_model(checkpoints[2], OPTIONS):
        assert not used.weights.is_dir()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_the_lock_is_shared_while_it_is_read_and_free_after_an_error(tmp_path: Path, cache: Path) -> None:
    checkpoint = copy_of_demo(tmp_path / "model")
    with open_model(checkpoint, OPTIONS), open_model(checkpoint, OPTIONS):
        (lock,) = cache.glob("*.lock")
        with open(lock, "a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        open_model(checkpoint, OPTIONS)
    for path in cache.glob("*.lock"):
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert lock.exists()
    assert not list(cache.glob("*.converting"))


def test_a_workspace_is_used_as_it_is(workspace: Path, conversions: list[Path]) -> None:
    for path in (workspace, workspace / "model_repository/turbomind/1/weights", workspace / "triton_models/weights"):
        files = open_model(path, OPTIONS)
        assert files.weights.resolve() == (workspace / "model_repository/turbomind/1/weights").resolve()
        assert (files.tokenizer / "tokenizer.json").is_file()
        assert files.template_name == "qwen"
    assert conversions == []


def test_weights_without_a_tokenizer_are_refused(workspace: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(workspace / "model_repository/turbomind/1/weights", tmp_path / "b/a/weights"))
    (tmp_path / "other/1/tokenizer").mkdir(parents=True)  # near by, and not theirs
    with pytest.raises(WorkspaceError, match="no tokenizer"):
        open_model(alone, OPTIONS)


def test_a_folder_that_is_neither_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_model(tmp_path, OPTIONS)


@pytest.mark.parametrize("config", [TurbomindEngineConfig(max_batch_size=2), PytorchEngineConfig(max_batch_size=2)])
@pytest.mark.filterwarnings("ignore:no CUDA device")
def test_a_workspace_answers_with_either_config(workspace: Path, config: TurbomindEngineConfig | PytorchEngineConfig) -> None:
    with pipeline(workspace, backend_config=config) as pipe:
        response = pipe("What is 2 + 3?", top_k=1)
        assert pipe.model.engine.info.max_batch_size == 2
    assert isinstance(response, Response)
    assert "5" in response.text


def test_without_a_gpu_our_kernels_are_said_to_be_replaced(workspace: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.warns(UserWarning, match="no CUDA device"):
        pipeline(workspace, backend_config=TurbomindEngineConfig(max_batch_size=1)).close()
