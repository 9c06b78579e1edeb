"""The workspace's folders: what is real, what is a link, what the doors' configurations say, what may be replaced."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tests.converter.conftest import LLAMA, Workspace
from tritonclient.grpc import model_config_pb2

from turbotriton.cli.main import main
from turbotriton.contract.errors import ConfigError, TurbotritonError, WorkspaceError
from turbotriton.converter import convert as convert_module
from turbotriton.converter.repository import door_templates, find_weights
from turbotriton.converter.writer import verify_weights

DOORS = ("turbomind", "preprocessing", "postprocessing", "text")


@pytest.fixture(autouse=True)
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Minimal doors: these tests are about what the converter adds, not about the doors' own lines."""
    folder = tmp_path / "templates"
    for name in DOORS:
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(f'name: "{name}"\nbackend: "python"\nmax_batch_size: 1\n')
        (folder / name / "1" / "model.py").write_text(f"# the door {name}\n")
    monkeypatch.setattr(convert_module, "door_templates", lambda: folder)
    return folder


def tree(root: Path) -> dict[str, str]:
    """Every folder entry: "link -> target", "file" or "folder"; tensors and tokenizer files are left out."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = f"link -> {os.readlink(path)}"
        elif not re.search(r"/(weights|tokenizer)/", name):
            found[name] = "folder" if path.is_dir() else "file"
    return found


def model_config(path: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_all_doors(convert: Any, llama: Path) -> None:
    ws = convert(llama, "toy-model")
    door = ("1", "1/model.py", "config.pbtxt")
    folders = {"folder": ("", "/1"), "file": ("/1/model.py", "/config.pbtxt")}
    expected = {"model_repository": "folder", "triton_models": "folder"}
    for name in ("turbomind", "preprocessing", "postprocessing", "toy-model"):
        expected |= {f"model_repository/{name}{end}": kind for kind, ends in folders.items() for end in ends}
    assert len(door) * 4 + 4 + 2 == len(expected)
    expected |= {
        "model_repository/turbomind/1/weights": "folder",
        "model_repository/preprocessing/1/tokenizer": "folder",
        "model_repository/postprocessing/1/tokenizer": "link -> ../../preprocessing/1/tokenizer",
        "model_repository/toy-model/1/weights": "link -> ../../turbomind/1/weights",
        "model_repository/toy-model/1/tokenizer": "link -> ../../preprocessing/1/tokenizer",
        "triton_models/weights": "link -> ../model_repository/turbomind/1/weights",
        "triton_models/tokenizer": "link -> ../model_repository/preprocessing/1/tokenizer",
        "triton_models/interactive": "link -> ../model_repository/turbomind",
        "triton_models/preprocessing": "link -> ../model_repository/preprocessing",
        "triton_models/postprocessing": "link -> ../model_repository/postprocessing",
    }
    assert tree(ws.root) == expected
    assert all(path.exists() for path in ws.root.rglob("*")), "no link dangles"
    assert find_weights(ws.root) == (ws.root / "model_repository/turbomind/1/weights").resolve()


def test_text_door_alone_holds_weights_and_tokenizer(convert: Any, llama: Path) -> None:
    ws = convert(llama, "toy", served_name="chat.v1", doors="text")
    assert tree(ws.root) == {
        "model_repository": "folder",
        "model_repository/chat.v1": "folder",
        "model_repository/chat.v1/1": "folder",
        "model_repository/chat.v1/1/model.py": "file",
        "model_repository/chat.v1/1/tokenizer": "folder",
        "model_repository/chat.v1/1/weights": "folder",
        "model_repository/chat.v1/config.pbtxt": "file",
        "triton_models": "folder",
        "triton_models/tokenizer": "link -> ../model_repository/chat.v1/1/tokenizer",
        "triton_models/weights": "link -> ../model_repository/chat.v1/1/weights",
    }
    assert ws.llama["model_name"] == "toy"
    assert model_config(ws.root / "model_repository/chat.v1").name == "chat.v1"


def test_the_repository_folder_can_be_moved_alone(convert: Any, llama: Path, tmp_path: Path) -> None:
    ws = convert(llama)
    moved = (ws.root / "model_repository").rename(tmp_path / "moved")
    assert all(path.exists() for path in moved.rglob("*"))
    assert (moved / "toy/1/weights/config.ini").is_file()
    assert (moved / "postprocessing/1/tokenizer/tokenizer.json").is_file()


def test_parameters_and_names_in_the_doors_configurations(convert: Any, llama: Path) -> None:
    template = 'quote " backslash \\ newline \n tab \t braces {{ "{%" }} unicode é 你好 control \x01 end'
    config = json.loads((llama / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    ws = convert(llama, "toy", tp=2)
    repository = ws.root / "model_repository"
    turbomind = model_config(repository / "turbomind")
    assert turbomind.name == "turbomind"
    found = {key: value.string_value for key, value in turbomind.parameters.items()}
    assert found == {"tensor_para_size": "2", "model_name": "toy", "chat_template": template}
    text = model_config(repository / "toy")
    assert (text.name, text.backend) == ("toy", "python"), "the template's own lines stay"
    assert {key: value.string_value for key, value in text.parameters.items()} == {"chat_template": template}
    assert not model_config(repository / "preprocessing").parameters


def test_no_chat_template_no_parameter(convert: Any, llama: Path) -> None:
    config = json.loads((llama / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    ws = convert(llama)
    assert not model_config(ws.root / "model_repository/toy").parameters


def test_a_missing_door_template_is_an_incomplete_installation(convert: Any, llama: Path, templates: Path) -> None:
    (templates / "text" / "1" / "model.py").unlink()
    with pytest.raises(TurbotritonError, match=r"text/1/model\.py.*install turbotriton again"):
        convert(llama)


def test_manifest_lists_every_tensor_file_with_size_and_hash(convert: Any, llama: Path) -> None:
    ws = convert(llama)
    manifest = json.loads((ws.weights / "manifest.json").read_text())
    assert set(manifest["files"]) == ws.names() - {"manifest.json", "config.ini"}
    for name, entry in manifest["files"].items():
        assert entry["size"] == (ws.weights / name).stat().st_size
    assert verify_weights(ws.weights) == len(manifest["files"])


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "expected sha256"),
        (lambda path: os.truncate(path, 64), r"expected \d+ bytes by the manifest, found 64"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_verify_names_the_damaged_file(
    convert: Any, llama: Path, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ws = convert(llama)
    assert main(["convert", "--verify", "--dst-path", str(ws.root)]) == 0
    damage(ws.weights / "layers.1.attention.wo.0.weight")
    with pytest.raises(WorkspaceError, match=r"layers\.1\.attention\.wo\.0\.weight: " + message):
        verify_weights(ws.weights)
    capsys.readouterr()
    assert main(["convert", "--verify", "--dst-path", str(ws.root)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_verify_after_a_conversion_and_without_a_manifest(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "toy", str(llama), "--dst-path", str(tmp_path / "ws"), "--verify"]) == 0
    assert "verified:  17 files" in capsys.readouterr().out
    (tmp_path / "ws/model_repository/turbomind/1/weights/manifest.json").unlink()
    assert main(["convert", "--verify", "--dst-path", str(tmp_path / "ws")]) == 2
    assert "LMDeploy writes none" in capsys.readouterr().err
    assert main(["convert", "--verify", "--dst-path", str(llama)]) == 2


def test_overwrite_replaces_a_workspace_as_a_whole(convert: Any, llama: Path) -> None:
    first = convert(llama, "old-name")
    with pytest.raises(ConfigError, match="--overwrite"):
        convert(llama, "new-name")
    assert (first.root / "model_repository/old-name").is_dir(), "untouched by the refusal"
    second = convert(llama, "new-name", overwrite=True)
    assert not (second.root / "model_repository/old-name").exists()
    assert (second.root / "model_repository/new-name").is_dir()
    leftovers = [path.name for path in second.root.parent.iterdir() if path.name.startswith(".")]
    assert leftovers == []


def test_what_is_no_workspace_is_never_deleted(convert: Any, llama: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="no workspace"):
            convert(llama, dst="home", overwrite=overwrite)
    assert (home / "thesis.tex").read_text() == "years of work"
    ws = convert(llama)
    (ws.root / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no workspace"):
        convert(llama, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is no folder"):
        convert(llama, dst="file", overwrite=True)


def test_an_empty_destination_needs_no_overwrite(convert: Any, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert convert(llama, dst="empty").names()


def test_a_failed_write_leaves_the_old_workspace(convert: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = convert(llama)
    before = (ws.weights / "manifest.json").read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("turbotriton.converter.writer.WeightWriter.write", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        convert(llama, overwrite=True)
    assert (ws.weights / "manifest.json").read_bytes() == before
    assert not [path.name for path in ws.root.parent.iterdir() if path.name.startswith(".")]


def test_an_interrupt_between_the_two_renames_leaves_the_old_workspace(
    convert: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = convert(llama)
    before = tree(ws.root)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".converting"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(llama, overwrite=True)
    assert tree(ws.root) == before
    assert not [path.name for path in ws.root.parent.iterdir() if path.name.startswith(".")]


def convert_slowly(llama: Path, destination: Path) -> "subprocess.Popen[bytes]":
    """A conversion as a process of its own that has begun to write and does not get on."""
    code = (
        "import sys, time; from turbotriton.cli.main import main; from turbotriton.converter import writer\n"
        "writer.WeightWriter.finish = lambda self: time.sleep(60)\n"
        "sys.exit(main(['convert', 'toy', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, str(llama), "--dst-path", str(destination)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    # tests that run in a shell's background inherit an ignored SIGINT
    process = subprocess.Popen(command, env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    end = time.monotonic() + 60
    while not list(destination.parent.glob(f".{destination.name}.*.converting/**/norm.weight")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_conversion_that_is_stopped_leaves_nothing(number: signal.Signals, code: int, llama: Path, tmp_path: Path) -> None:
    process = convert_slowly(llama, tmp_path / "to" / "ws")
    process.send_signal(number)
    assert process.wait(30) == code
    assert list((tmp_path / "to").iterdir()) == []


def test_what_a_killed_conversion_left_goes_with_the_next_and_what_a_running_one_writes_stays(
    llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "to"
    killed = convert_slowly(llama, folder / "ws")
    killed.kill()
    killed.wait()
    (left,) = folder.iterdir()
    running = convert_slowly(llama, folder / "other")
    (writing,) = folder.glob(".other.*")
    try:
        for name in ("other", "ws"):
            assert main(["convert", "toy", str(llama), "--dst-path", str(folder / name)]) == 0
            assert writing.exists()
        assert not left.exists()
    finally:
        running.kill()
        running.wait()


def test_the_workspace_is_readable_as_the_umask_says(convert: Any, llama: Path) -> None:
    old = os.umask(0o022)
    try:
        assert convert(llama).root.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(old)


@pytest.mark.parametrize("trust", [False, True])
def test_checkpoints_code_is_copied_only_when_trusted(convert: Any, llama: Path, trust: bool) -> None:
    (llama / "modeling_toy.py").write_text("raise SystemExit('never run')\n")
    (llama / "extra.json").write_text("{}")
    (llama / "added.safetensors.txt").write_text("no tokenizer file")
    folder = convert(llama, trust_remote_code=trust).root / "triton_models/tokenizer"
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "extra.json"} <= names
    assert ("modeling_toy.py" in names) is trust
    assert "added.safetensors.txt" not in names


def test_output_does_not_depend_on_when_or_where(convert: Any, llama: Path) -> None:
    def contents(ws: Workspace) -> dict[str, bytes]:
        files = (path for path in ws.root.rglob("*") if path.is_file() and not path.is_symlink())
        return {path.relative_to(ws.root).as_posix(): path.read_bytes() for path in files}

    assert LLAMA["vocab_size"] == 301
    assert contents(convert(llama, dst="a")) == contents(convert(llama, dst="deeper/b"))


def test_progress_shows_layers_and_gigabytes_a_second_on_a_terminal(llama: Path, tmp_path: Path) -> None:
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "-m", "turbotriton", "convert", "toy", str(llama), "--dst-path", str(tmp_path / "ws")]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, stderr=secondary, stdout=subprocess.PIPE, env=environment, check=False, cwd=tmp_path)
    os.close(secondary)
    shown = os.read(primary, 65536).decode()
    os.close(primary)
    assert result.returncode == 0, shown
    assert re.search(r"converting: +100%.* 2/2 .*0\.00 GB, \d+\.\d\d GB/s", shown), shown


def test_the_installed_doors_are_complete_configurations(convert: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real templates: filled in, each is a whole ModelConfig on KIND_CPU, and no parameter of ours was there before."""
    monkeypatch.setattr(convert_module, "door_templates", door_templates)
    repository = convert(llama, "toy").root / "model_repository"
    for name in ("turbomind", "preprocessing", "postprocessing", "toy"):
        config = model_config(repository / name)
        assert (config.name, config.backend) == (name, "python")
        assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_CPU]
        assert config.input, name
        assert config.output, name
        assert 'key: "model_name"' not in (door_templates() / "turbomind" / "config.pbtxt").read_text()
