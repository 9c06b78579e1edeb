"""Files come whole and in any order, are read ahead within bounds, and one that is too short is named."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from turbotriton.backend.runner import file_stream
from turbotriton.backend.runner.file_stream import FileStream
from turbotriton.contract.errors import WorkspaceError

CHUNK = 64
SIZES = (1, 63, 64, 65, 1000, 4096, 0)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def files(tmp_path: Path) -> dict[Path, bytes]:
    draw = np.random.default_rng(0)
    contents = {tmp_path / f"{index}.weight": draw.bytes(size) for index, size in enumerate(SIZES)}
    for path, content in contents.items():
        path.write_bytes(content)
    return contents


@pytest.fixture(params=DEVICES)
def stream(request: pytest.FixtureRequest, files: dict[Path, bytes]) -> Iterator[FileStream]:
    stream = FileStream(((path, len(content)) for path, content in files.items()), torch.device(request.param), CHUNK)
    yield stream
    stream.close()


@pytest.mark.parametrize("step", [1, -1])
def test_every_file_arrives_as_it_is(stream: FileStream, files: dict[Path, bytes], step: int) -> None:
    """Announced in one order, taken in that or the other."""
    for path in list(files)[::step]:
        assert bytes(stream.take(path).cpu().tolist()) == files[path]


def test_what_is_read_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch, files: dict[Path, bytes]) -> None:
    monkeypatch.setattr(file_stream, "AHEAD_BYTES", 200)
    stream = FileStream(((path, len(content)) for path, content in files.items()), torch.device("cpu"), CHUNK)
    begun = []
    begin = stream._begin
    monkeypatch.setattr(stream, "_begin", lambda path: (begun.append(path), begin(path)))
    paths = list(files)
    stream.take(paths[0])
    assert begun == paths[:5]  # the first, then 63 + 64 + 65 bytes are fewer than 200, with the next they are more
    stream.take(paths[1])
    assert begun == paths[:5]
    stream.close()


def test_a_file_that_was_cut_meanwhile_is_named(files: dict[Path, bytes]) -> None:
    path = max(files, key=lambda path: len(files[path]))
    stream = FileStream([(path, len(files[path]))], torch.device("cpu"), CHUNK)
    path.write_bytes(files[path][:-1])
    with pytest.raises(WorkspaceError, match=rf"{path.name}: ends after 4095 bytes"):
        stream.take(path)
    stream.close()


def test_weights_that_were_streamed_are_those_that_were_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench.make_checkpoint import make_checkpoint

    from turbotriton.backend.runner import weights
    from turbotriton.contract.ini import read_workspace_config

    make_checkpoint("tiny", tmp_path, "fp32", 64)
    model = read_workspace_config(tmp_path / "config.ini").model_config()
    mapped = weights.load_weights(model, tmp_path, torch.device("cpu"), torch.float32)

    class Streaming(weights._Reader):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            self._stream = FileStream(self._files(), torch.device("cpu"), chunk_bytes=1000)

    monkeypatch.setattr(weights, "_Reader", Streaming)
    streamed = weights.load_weights(model, tmp_path, torch.device("cpu"), torch.float32)
    assert torch.equal(streamed.embeddings, mapped.embeddings)
    assert torch.equal(streamed.head.weight, mapped.head.weight)
    for ours, theirs in zip(streamed.layers, mapped.layers, strict=True):
        assert torch.equal(ours.qkv.qkv.weight, theirs.qkv.qkv.weight)
        assert torch.equal(ours.gate_up.weight, theirs.gate_up.weight)
        assert torch.equal(ours.down.weight, theirs.down.weight)
