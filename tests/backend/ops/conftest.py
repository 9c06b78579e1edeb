"""How the kernel tests run: on a GPU, and on any CPU under triton's interpreter.

A case takes the fixture `target`. Its CPU variants carry the marker `interpreted`: TRITON_INTERPRET must stand in the environment
before anything imports triton, which an ordinary test run cannot promise, so the first of a file runs all of that file that were selected
in one child pytest with the variable set, and each then reports its own outcome from there.

    parent: selected `interpreted` items of a file ──one child, TRITON_INTERPRET=1──> {node id: failure text or ""} ──> each item
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tests.backend.ops.launch_recorder")  # its comparisons tell what differs, as a test's do

ROOT = Path(__file__).resolve().parents[3]
REPORT_VARIABLE = "TURBOTRITON_TEST_INTERPRETED_REPORT"  # set for the child only: where it writes its outcomes
CHILD_SECONDS = 1500  # a minute or two on a machine that has nothing else to do
OUTCOMES = pytest.StashKey[dict[Path, dict[str, str]]]()
GUARD = 64  # elements before and after every output

# fp16 and fp32 only: in triton 3.9 the interpreter's tl.dot on bf16 returned garbage. fp32 takes as long again: CI's
TARGETS = [
    pytest.param(("cpu", torch.float16), id="interpreted-fp16", marks=pytest.mark.interpreted),
    pytest.param(("cpu", torch.float32), id="interpreted-fp32", marks=(pytest.mark.interpreted, pytest.mark.slow)),
    *(pytest.param(("cuda", dtype), id=f"cuda-{name}", marks=pytest.mark.gpu) for name, dtype in
      [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]),
]  # fmt: skip


def pytest_configure() -> None:
    if os.environ.get(REPORT_VARIABLE):
        _repair_interpreter_of_triton_3_6()


def _repair_interpreter_of_triton_3_6() -> None:
    """Its scalars are arrays of one element, which new numpy refuses as loop bounds; triton 3.7 squeezes them, as here."""
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # type: ignore[no-untyped-def]
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


def _runs_in_child(item: pytest.Item) -> bool:
    return item.get_closest_marker("interpreted") is not None and not os.environ.get(REPORT_VARIABLE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _runs_in_child(item):  # the first of a file waits for all of them
            item.add_marker(pytest.mark.timeout(CHILD_SECONDS + 60))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not _runs_in_child(pyfuncitem):
        return None
    session, path = pyfuncitem.session, pyfuncitem.path
    outcomes = session.stash.setdefault(OUTCOMES, {})
    if path not in outcomes:
        mine = [item.nodeid for item in session.items if _runs_in_child(item) and item.path == path]
        outcomes[path] = _run_interpreted(mine)
    failure = outcomes[path].get(pyfuncitem.nodeid, "the child ended before this case: it crashed or ran out of time")
    if failure:
        pytest.fail(failure, pytrace=False)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(REPORT_VARIABLE)
    if path and (report.when == "call" or report.failed or report.skipped):
        with open(path, "a") as file:
            file.write(json.dumps([report.nodeid, "" if report.passed else f"{report.outcome}: {report.longreprtext}"]) + "\n")


def _run_interpreted(node_ids: list[str]) -> dict[str, str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        report.touch()
        environment = os.environ | {"TRITON_INTERPRET": "1", REPORT_VARIABLE: str(report), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreted", *node_ids]
        child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
        lines = [json.loads(line) for line in report.read_text().splitlines()]
    if not lines:
        pytest.fail(f"the interpreted child ran no test:\n{child.stdout}\n{child.stderr}", pytrace=False)
    outcomes: dict[str, str] = {}
    for node_id, failure in lines:
        outcomes[node_id] = outcomes.get(node_id, "") + failure
    return outcomes


@dataclass(frozen=True)
class Target:
    device: str
    dtype: torch.dtype
    generator: torch.Generator

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal values that the dtype holds exactly, so that the float64 oracle starts from the same numbers."""
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype).to(self.device)

    def randn_fp32(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)


def on_cpu(dtype: torch.dtype, seed: int = 0) -> Target:
    return Target("cpu", dtype, torch.Generator().manual_seed(seed))


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    device, dtype = request.param
    return Target(device, dtype, torch.Generator().manual_seed(0))


@pytest.fixture
def guarded_outputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a launcher allocates starts as NaN, between guard bands of NaN that must still be NaN afterwards."""
    whole, plain_empty = [], torch.empty

    def guarded_empty(shape, dtype, device):  # type: ignore[no-untyped-def]
        if not dtype.is_floating_point:  # it has no NaN
            return plain_empty(shape, dtype=dtype, device=device)
        numel = torch.Size(shape).numel()
        buffer = torch.full((numel + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        whole.append(buffer)
        return buffer[GUARD : GUARD + numel].view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    monkeypatch.setattr(torch, "empty_like", lambda like: guarded_empty(like.shape, like.dtype, like.device))
    yield
    assert whole or _runs_in_child(request.node), "the launcher allocated nothing"
    for buffer in whole:
        assert buffer[:GUARD].isnan().all(), "written before an output"
        assert buffer[-GUARD:].isnan().all(), "written after an output"


@pytest.fixture
def assert_close() -> Callable[..., None]:
    def check(actual: torch.Tensor, expected: torch.Tensor, *, max_error: float, rms_error: float) -> None:
        """Errors relative to max(|expected|, RMS of expected): near zeros an element is judged by the size of its neighbours."""
        assert actual.shape == expected.shape
        if expected.numel() == 0:
            return
        wide = expected.double()
        rms = wide.square().mean().sqrt().item()
        relative = (actual.double() - wide).abs() / wide.abs().clamp_min(max(rms, 1e-30))
        worst, mean = relative.max().item(), relative.square().mean().sqrt().item()
        # `not <=` so that NaN fails
        assert worst <= max_error, f"max relative error {worst:.3g} > {max_error:.3g}"
        assert mean <= rms_error, f"RMS relative error {mean:.3g} > {rms_error:.3g}"

    return check
