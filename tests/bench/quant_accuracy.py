"""What each format costs the demo model and stories260K: python -m tests.bench.quant_accuracy [--per-kind 20] [--stories FOLDER]

Scores held-out answers of the demo model against its own 16 bit form and asks it held-out questions of every kind, through the
engine; with --stories also stories that stories260K draws itself. Calibrated on the training split, 32 windows of 512 tokens. On the
CPU, in fp32: what is measured is the format, not the kernels. Every form is made by the commands that a user types.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tests.quant.accuracy import FORMS, DemoForms, divergence, held_out_answers, own_questions, own_stories
from tests.quant.formats import convert

from turbotriton.backend.runner.weights import find_weights_dir
from turbotriton.cli.main import main as turbotriton
from turbotriton.quant.report import Report

HEAD = f"{'form':26s} {'perplexity':>10s} {'rise':>8s} {'KL':>9s} {'top-1':>8s}"


def row(name: str, report: Report) -> str:
    rise = f"{report.perplexity_rise:+.2%}"
    return f"{name:26s} {report.perplexity:10.4f} {rise:>8s} {report.mean_kl:9.6f} {report.top1_agreement:8.2%}"


def linear_bytes(workspace: Path) -> int:
    """Files of linear layers."""
    names = ("w_qkv", "wo", "w1", "w2", "w3", "w13")
    return sum(path.stat().st_size for path in find_weights_dir(workspace).glob("layers.*") if path.name.split(".")[3] in names)


def measure_demo(folder: Path, per_kind: int) -> dict[str, dict[str, float]]:
    forms, documents = DemoForms(folder, samples=32, seqlen=512), held_out_answers(per_kind)
    dense = forms.workspace("dense")
    found = {}
    print(f"demo model\n{HEAD} {'questions':>10s} {'linear bytes':>13s}")
    for name, (weights, quant_policy) in {"16 bit": ("dense", 0), **FORMS}.items():
        workspace = forms.workspace(weights)
        report = divergence(dense, workspace, quant_policy, documents)
        questions = own_questions(workspace, quant_policy, per_kind)
        size = linear_bytes(workspace) / linear_bytes(dense)
        print(f"{row(name, report)} {questions.overall:10.2%} {size:12.3f}x", flush=True)
        found[name] = {"rise": report.perplexity_rise, "kl": report.mean_kl, "right": questions.overall, "linear_bytes": size}
    return found


def measure_stories(folder: Path, model: Path) -> dict[str, dict[str, float]]:
    dense = convert(model, folder / "stories")
    options = ["--device", "cpu", "--calib-samples", "32", "--calib-seqlen", "256"]
    workspaces = {"dense": dense}
    for kind in ("int8", "fp8"):
        work = folder / f"stories-{kind}"
        assert turbotriton(["lite", "smooth_quant", str(model), "--work-dir", str(work), "--quant-dtype", kind, *options]) == 0
        workspaces[kind] = convert(work, folder / f"stories-{kind}-workspace")
    documents, found = own_stories(dense, 32, 250), {}
    print(f"stories260K, {len(documents)} stories of its own\n{HEAD}")
    for name, (weights, quant_policy) in FORMS.items():
        if weights in workspaces:
            report = divergence(dense, workspaces[weights], quant_policy, documents)
            print(row(name, report), flush=True)
            found[name] = {"rise": report.perplexity_rise, "kl": report.mean_kl}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--per-kind", type=int, default=20, help="held-out questions of each of the 18 kinds")
    parser.add_argument("--stories", type=Path, help="folder of stories260K")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {"demo": measure_demo(Path(folder), args.per_kind)}
        if args.stories:
            result["stories260K"] = measure_stories(Path(folder), args.stories)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
