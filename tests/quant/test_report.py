"""The report's numbers against numpy in loops, and the command with its files."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tests.quant.formats import convert

from turbotriton.cli.main import main
from turbotriton.demo import checkpoint_path
from turbotriton.quant.datasets import Document, Window, consecutive_windows, load_documents, load_tokenizer
from turbotriton.quant.report import compare

torch.set_num_threads(1)


def test_perplexity_divergence_and_agreement_are_the_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    windows, nll, divergences, agreed = [], [0.0, 0.0], [], 0
    for length, unscored in ((5, 0), (7, 3), (2, 0)):
        a = torch.randn(length, 11, generator=generator) * 3
        b = a + torch.randn(length, 11, generator=generator)
        ids = torch.randint(0, 11, (length,), generator=generator)
        windows.append((a, b, Window(ids, unscored)))
        for position in range(length - 1):
            if position + 1 < unscored:
                continue  # predicts a token that is only read
            p, q = (np.exp(x[position].double().numpy()) / np.exp(x[position].double().numpy()).sum() for x in (a, b))
            target = int(ids[position + 1])
            nll[0] -= math.log(p[target])
            nll[1] -= math.log(q[target])
            divergences.append(sum(float(x * math.log(x / y)) for x, y in zip(p, q, strict=True)))
            agreed += int(p.argmax() == q.argmax())
    report = compare("x", windows).report
    count = len(divergences)
    assert report.num_tokens == count == 4 + 4 + 1
    assert report.original_perplexity == pytest.approx(math.exp(nll[0] / count))
    assert report.perplexity == pytest.approx(math.exp(nll[1] / count))
    assert report.perplexity_rise == pytest.approx(math.exp((nll[1] - nll[0]) / count) - 1)
    assert report.mean_kl == pytest.approx(sum(divergences) / count)
    assert report.top1_agreement == pytest.approx(agreed / count)


def test_windows_cover_a_document_and_never_mix_two() -> None:
    tokenizer = load_tokenizer(checkpoint_path())
    documents = [Document("Count from 1 to 9. " * 4, "<|im_start|>user\n"), Document("hello")]
    windows = consecutive_windows(tokenizer, documents, 16, 1000)
    prompt, text = (tokenizer.encode(part, add_special_tokens=False).ids for part in reversed(documents[0]))
    last = tokenizer.encode("hello").ids
    assert torch.cat([window.token_ids for window in windows]).tolist() == prompt + text + last
    assert all(len(window.token_ids) <= 16 for window in windows)
    assert sum(window.num_unscored for window in windows) == len(prompt)


def test_a_jsonl_may_hold_strings_chats_and_prompts(tmp_path: Path) -> None:
    lines = [
        '"plain"',
        '{"text": "t"}',
        '{"messages": [{"content": "a"}, {"content": "b"}]}',
        '{"prompt": "p", "completion": "c"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "y.txt").write_text("file")
    found = load_documents(str(tmp_path))
    assert [tuple(document) for document in found] == [("plain", ""), ("t", ""), ("a\nb", ""), ("c", "p"), ("file", "")]


def test_the_command_prints_writes_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = convert(checkpoint_path(), tmp_path / "w")
    (tmp_path / "t.txt").write_text("Count from 1 to 9: 1, 2, 3, 4, 5, 6, 7, 8, 9. " * 20)
    files = ["--plot", str(tmp_path / "p.svg"), "--json", str(tmp_path / "r.json")]
    options = ["--text", str(tmp_path / "t.txt"), "--device", "cpu", "--seqlen", "64", "--num-tokens", "200"]
    capsys.readouterr()
    assert main(["lite", "report", str(workspace), str(workspace), "--quant-policy", "4", *options, *files]) == 0
    said = capsys.readouterr().out
    numbers = json.loads((tmp_path / "r.json").read_text())
    assert f"{numbers['perplexity']:.4f}, original {numbers['original_perplexity']:.4f}" in said
    assert 0 < numbers["mean_kl"] < 1
    assert 0.8 < numbers["top1_agreement"] <= 1
    bars = ElementTree.parse(tmp_path / "p.svg").getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + 40  # the page and the bins
    assert any(float(bar.get("height", "0")) > 0 for bar in bars[1:])
    assert main(["lite", "report", str(workspace), str(workspace), *options, "--plot", "/nowhere/x.svg"]) == 2
    assert "--plot /nowhere/x.svg" in capsys.readouterr().err
