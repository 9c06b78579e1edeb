"""Accuracy of a quantised form of a trained model: on held-out answers of the demo model, and on stories of stories260K's own."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.quant.formats import convert, quantise

from turbotriton import GenerationConfig, TurbomindEngineConfig, pipeline
from turbotriton.backend.runner.scoring import Scorer
from turbotriton.cli.main import main
from turbotriton.demo import checkpoint_path
from turbotriton.demo.training.corpus import sample
from turbotriton.demo.training.evaluate import Report as QuestionReport
from turbotriton.demo.training.tokenizer import render
from turbotriton.quant.datasets import Document, consecutive_windows, load_tokenizer
from turbotriton.quant.report import Report, compare

#: name -> (weights, quant_policy); static: with the files of `kv_qparams`
FORMS: Mapping[str, tuple[str, int]] = {
    "AWQ": ("awq", 0),
    "W8A8 int8": ("int8", 0),
    "W8A8 FP8": ("fp8", 0),
    "KV int8": ("dense", 8),
    "KV FP8": ("dense", 16),
    "KV int4": ("dense", 4),
    "KV int8, static scales": ("static", 4),
    "AWQ + KV int8": ("awq", 8),
    "AWQ + KV int4": ("awq", 4),
}
SEQLEN = 512


class DemoForms:
    """Workspaces of the demo model's forms in `folder`, made when they are asked for. Calibrated on chats of its training split."""

    def __init__(self, folder: Path, *, samples: int, seqlen: int) -> None:
        self._folder, self._samples, self._seqlen = folder, samples, seqlen
        self.training_text = folder / "train.jsonl"
        with open(self.training_text, "w", encoding="utf-8") as file:
            for example in sample("train", 40, seed=1):
                chat = render(example.prompt, add_generation_prompt=True) + example.accepted[0] + "<|im_end|>"
                file.write(json.dumps(chat) + "\n")

    def workspace(self, weights: str) -> Path:
        destination = self._folder / f"{weights}-workspace"
        if destination.exists():
            return destination
        if weights in ("dense", "static"):
            convert(checkpoint_path(), destination)
        else:
            checkpoint = quantise(
                weights, self._folder / weights, samples=self._samples, seqlen=self._seqlen, dataset=str(self.training_text)
            )
            convert(checkpoint, destination)
        if weights == "static":
            options = ["--device", "cpu", "--calib-dataset", str(self.training_text), "--calib-samples", str(self._samples)]
            stats = str(self._folder / "stats")
            command = ["lite", "calibrate", str(checkpoint_path()), "--work-dir", stats, "--calib-seqlen", str(self._seqlen)]
            assert main([*command, *options]) == 0
            assert main(["lite", "kv_qparams", stats, str(destination)]) == 0
        return destination


def held_out_answers(per_kind: int) -> list[Document]:
    """Chats of the test split; the prompt is read, the answer scored."""
    return [
        Document(example.accepted[0] + "<|im_end|>", render(example.prompt, add_generation_prompt=True))
        for example in sample("test", per_kind, seed=5)
    ]


def divergence(original: Path, quantized: Path, quant_policy: int, documents: list[Document], seqlen: int = SEQLEN) -> Report:
    tokenizer = load_tokenizer(original / "triton_models" / "tokenizer")
    windows = consecutive_windows(tokenizer, documents, seqlen, 10**9)
    scorers = [
        Scorer(path, seqlen, quant_policy=policy, device="cpu") for path, policy in ((original, 0), (quantized, quant_policy))
    ]
    pairs = ((scorers[0].logits(w.token_ids), scorers[1].logits(w.token_ids), w) for w in windows)
    return compare(str(quantized), pairs).report


def own_questions(workspace: Path, quant_policy: int, per_kind: int) -> QuestionReport:
    """Held-out questions of every kind, through the engine, greedy."""
    report, examples = QuestionReport(), list(sample("test", per_kind, seed=5))
    prompts = [[{"role": role, "content": content} for role, content in example.prompt] for example in examples]
    config = TurbomindEngineConfig(session_len=640, cache_max_entry_count=640, quant_policy=quant_policy, max_batch_size=64)
    with pipeline(workspace, backend_config=config) as ask:
        answers = ask(prompts, gen_config=GenerationConfig(top_k=1, max_new_tokens=256))
    for example, answer in zip(examples, answers, strict=True):
        report.asked[example.kind] += 1
        report.right[example.kind] += example.is_right(answer.text)
    return report


def own_stories(workspace: Path, count: int, length: int) -> list[Document]:
    """Texts that the model itself draws: what it finds likely, where it can be wrong by little."""
    config = TurbomindEngineConfig(session_len=512, cache_max_entry_count=64)
    with pipeline(workspace, backend_config=config) as ask:
        draws = [GenerationConfig(top_k=0, temperature=1.0, max_new_tokens=length, random_seed=seed) for seed in range(count)]
        answers = ask(["Once upon a time"] * count, gen_config=draws, do_preprocess=False)
    return [Document(answer.text, "Once upon a time") for answer in answers]
