"""How much each format costs trained models. Bounds are the goals; docs/quantization.md has the measured numbers."""

import logging
from pathlib import Path

import pytest
import torch
from tests.quant.accuracy import FORMS, DemoForms, divergence, held_out_answers, own_questions, own_stories
from tests.quant.formats import convert

from turbotriton.cli.main import main
from turbotriton.demo import checkpoint_path

torch.set_num_threads(1)

#: perplexity may rise by, against 16 bit
RISE = {
    "AWQ": 0.03,
    "W8A8 int8": 0.015,
    "W8A8 FP8": 0.015,
    "KV int8": 0.003,
    "KV int8, static scales": 0.003,
    "KV FP8": 0.015,
    "KV int4": 0.03,
}
RIGHT = 0.93


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> DemoForms:
    return DemoForms(tmp_path_factory.mktemp("forms"), samples=16, seqlen=256)


@pytest.mark.parametrize("name", RISE)
def test_perplexity_of_held_out_answers_hardly_rises(forms: DemoForms, name: str) -> None:
    weights, quant_policy = FORMS[name]
    report = divergence(forms.workspace("dense"), forms.workspace(weights), quant_policy, held_out_answers(3))
    assert report.num_tokens > 500
    assert report.mean_kl > 0, "nothing was quantised"
    assert report.perplexity_rise <= RISE[name]
    assert report.top1_agreement >= 0.97


def test_a_search_is_no_worse_than_plain_rounding(forms: DemoForms, tmp_path: Path) -> None:
    documents, reports = held_out_answers(8), {}
    for rule in ("--search-scale", "--round-to-nearest"):
        work = tmp_path / rule
        options = ["--device", "cpu", "--calib-samples", "16", "--calib-seqlen", "256"]
        options += ["--calib-dataset", str(forms.training_text)]
        assert main(["lite", "auto_awq", str(checkpoint_path()), "--work-dir", str(work), rule, *options]) == 0
        reports[rule] = divergence(forms.workspace("dense"), convert(work, tmp_path / f"w{rule}"), 0, documents)
    search, plain = reports["--search-scale"], reports["--round-to-nearest"]
    assert search.mean_kl < plain.mean_kl
    assert search.perplexity <= plain.perplexity * 1.0005  # the noise of two roundings where both are almost right


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "AWQ + KV int4" else pytest.mark.slow) for name in FORMS]
)
def test_the_demo_models_own_questions_stay_right(forms: DemoForms, name: str) -> None:
    weights, quant_policy = FORMS[name]
    report = own_questions(forms.workspace(weights), quant_policy, 3 if name == "AWQ + KV int4" else 12)
    assert report.overall >= RIGHT, report.table(0)


@pytest.mark.parametrize(
    ("weights", "quant_policy", "rise"),
    [("dense", 8, 0.003), ("dense", 4, 0.03), ("dense", 16, 0.015), ("int8", 0, 0.015)],
)
def test_stories260k_on_stories_of_its_own(assets: Path, tmp_path: Path, weights: str, quant_policy: int, rise: float) -> None:
    model = assets / "models" / "stories260K"
    dense = convert(model, tmp_path / "dense")
    logging.getLogger("turbotriton").setLevel(logging.INFO)
    documents = own_stories(dense, 4, 200)
    workspace = dense
    if weights == "int8":
        options = ["--device", "cpu", "--calib-samples", "16", "--calib-seqlen", "256"]
        assert main(["lite", "smooth_quant", str(model), "--work-dir", str(tmp_path / "q"), *options]) == 0
        workspace = convert(tmp_path / "q", tmp_path / "w")
    report = divergence(dense, workspace, quant_policy, documents)
    assert report.num_tokens > 400
    assert report.mean_kl > 0
    assert report.original_perplexity < 30  # its own text, not noise
    assert report.perplexity_rise <= rise
