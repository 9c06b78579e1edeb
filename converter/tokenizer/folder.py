"""Copies the checkpoint's tokenizer files and completes them.

After `write_tokenizer` the folder holds tokenizer.json (copied, or converted from SentencePiece, tiktoken or vocab.json with
merges.txt and compared on a text) and a tokenizer_config.json with bos_token, eos_token and chat_template where the checkpoint
has them anywhere; where it has no template, that of the row that the model's name or path stands for.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from turbotriton.contract.chat_templates import find_template
from turbotriton.contract.errors import CheckpointError
from turbotriton.contract.row_jinja import row_jinja

from .from_sentencepiece import tokenizer_from_sentencepiece
from .from_tiktoken import LLAMA3, QWEN, is_tiktoken, tokenizer_from_tiktoken
from .from_vocab import tokenizer_from_vocab

__all__ = ["TokenizerFolder", "write_tokenizer"]

logger = logging.getLogger(__name__)

SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class TokenizerFolder:
    """stop_token_ids: those of the stop words that the template's row names, where a row stands in for a missing template."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None
    stop_token_ids: tuple[int, ...] = ()


def write_tokenizer(
    model_path: Path, tokenizer_path: Path | None, target: Path, *, copy_code: bool, template_name: str | None = None
) -> TokenizerFolder:
    """Fills `target` (made here). `tokenizer_path`: a folder or one file that replaces the checkpoint's tokenizer.
    `template_name`: the row that becomes the chat template where the checkpoint has none.

    As LMDeploy does, every *.json of the checkpoint is copied, *.py only with `copy_code`. Raises CheckpointError.
    """
    target.mkdir(parents=True)
    folder = tokenizer_path if tokenizer_path is not None and tokenizer_path.is_dir() else model_path
    patterns = ["*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]
    for pattern in (*patterns, *(["*.py"] if copy_code else [])):
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    given = tokenizer_path if tokenizer_path is not None and tokenizer_path.is_file() else None
    if given is not None:
        _replace_tokenizer(given, target)
    elif tokenizer_path is not None and not tokenizer_path.is_dir():
        raise CheckpointError(f"{tokenizer_path}: does not exist; --tokenizer-path takes a file or a folder")
    config = _complete_config(target)
    if not (target / "tokenizer.json").is_file():
        _convert(target, config, folder, given).save(str(target / "tokenizer.json"))
    try:
        tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception
        raise CheckpointError(f"{given or folder / 'tokenizer.json'}: cannot be read ({error}); download it again") from None
    stop_token_ids = _use_row(template_name, config, tokenizer)
    if _add_special_tokens(config, target, tokenizer) or stop_token_ids is not None:
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return TokenizerFolder(
        bos_token_id=_token_id(tokenizer, config.get("bos_token")),
        eos_token_id=_token_id(tokenizer, config.get("eos_token")),
        chat_template=config.get("chat_template"),
        stop_token_ids=stop_token_ids or (),
    )


def _use_row(name: str | None, config: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """Puts the row's Jinja into a `config` that has no chat template; -> ids of its stop words, or None: nothing was done."""
    row = find_template(name or "")
    if row is None or row.capability != "chat" or config.get("chat_template"):
        return None
    bos = _token_id(tokenizer, config.get("bos_token"))
    adds_bos = bos is not None and (bool(config.get("add_bos_token")) or tokenizer.encode("a").ids[:1] == [bos])
    config["chat_template"] = row_jinja(row, adds_bos=adds_bos)
    logger.info("the checkpoint has no chat template: taking the one of %r (turbotriton list)", row.name)
    ids = (tokenizer.token_to_id(word) for word in row.stop_words)
    return tuple(token_id for token_id in ids if token_id is not None)


def _replace_tokenizer(path: Path, target: Path) -> None:
    """One given file stands for the tokenizer: the checkpoint's own must not win over it."""
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "qwen.tiktoken"):
        (target / name).unlink(missing_ok=True)
    kinds = {".model": "tokenizer.model", ".tiktoken": "qwen.tiktoken", ".json": "tokenizer.json"}
    if path.suffix not in kinds:
        raise CheckpointError(f"{path}: is no tokenizer file; expected *.model (SentencePiece), *.tiktoken or tokenizer.json")
    shutil.copyfile(path, target / kinds[path.suffix])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name}: is no JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name}: is no JSON object; download it again")
    return content


def _text(token: Any) -> str | None:
    """Special tokens are written as text or as {"content": text, ...}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _token_id(tokenizer: Tokenizer, token: Any) -> int | None:
    text = _text(token)
    return None if text is None else tokenizer.token_to_id(text)


def _complete_config(target: Path) -> dict[str, Any]:
    """tokenizer_config.json with what other files know better: special_tokens_map.json and chat_template.jinja (or .json)."""
    config = _read_json(target / "tokenizer_config.json")
    for key, token in _read_json(target / "special_tokens_map.json").items():
        if key in SPECIAL_KEYS and config.get(key) is None:
            config[key] = token
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
    if (target / "chat_template.jinja").is_file():
        template = (target / "chat_template.jinja").read_text(encoding="utf-8")
    elif template is None:
        template = _read_json(target / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    else:
        config.pop("chat_template", None)
    return config


def _convert(target: Path, config: dict[str, Any], folder: Path, given: Path | None) -> Tokenizer:
    """From the copies in `target`; errors name the originals: in `folder`, or the one file that was `given`."""
    model = target / "tokenizer.model"
    if model.is_file():
        origin = given or folder / model.name
        if is_tiktoken(model):
            return tokenizer_from_tiktoken(origin, LLAMA3)
        added = config.get("added_tokens_decoder") or {}
        if added == {}:  # how transformers wrote them before 4.34
            for text, text_id in _read_json(target / "added_tokens.json").items():
                added[str(text_id)] = {"content": text, "special": True}
        return tokenizer_from_sentencepiece(origin, {**config, "added_tokens_decoder": added})
    if (target / "vocab.json").is_file() and (target / "merges.txt").is_file():
        return tokenizer_from_vocab(folder)
    tiktoken = sorted(target.glob("*.tiktoken"))
    if tiktoken:
        return tokenizer_from_tiktoken(given or folder / tiktoken[0].name, QWEN)
    raise CheckpointError(
        f"{folder}: holds no tokenizer.json, tokenizer.model, vocab.json with merges.txt or qwen.tiktoken; "
        "give one by --tokenizer-path"
    )


def _add_special_tokens(config: dict[str, Any], target: Path, tokenizer: Tokenizer) -> bool:
    """Fills bos_token and eos_token from the usual names where no file says them; True when the file has to be written.

    Only special tokens count: "<s>" is an ordinary word of Qwen's vocabulary.
    """
    changed = config != _read_json(target / "tokenizer_config.json")
    usual = {"bos_token": ("<s>", "<|begin_of_text|>"), "eos_token": ("</s>", "<|endoftext|>", "<|end_of_text|>")}
    if not (target / "tokenizer_config.json").is_file():
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        for key, names in usual.items():
            found = next((name for name in names if name in special), None)
            if _text(config.get(key)) is None and found:
                config[key] = found
        return True
    return changed
