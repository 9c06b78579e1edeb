"""Token ids to text and back: the whole text at once (`TextTokenizer`) or as it grows (`IncrementalDetokenizer`)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from turbotriton.contract.errors import WorkspaceError

from .literal_tokens import LiteralEncoder

__all__ = ["IncrementalDetokenizer", "TextTokenizer"]

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # of the prompt: a decoder looks back at most over the byte tokens of one character


class TextTokenizer:
    """Around `tokenizers.Tokenizer`: what the folder's tokenizer.json, tokenizer_config.json and generation_config.json say."""

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any], generation: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._literal = LiteralEncoder(tokenizer)
        self.vocab_size = int(tokenizer.get_vocab_size(with_added_tokens=True))
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.bos_token_id = self._id_of(self.bos_token)
        self.eos_token_id = self._id_of(self.eos_token)
        listed = generation.get("eos_token_id")
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        own = [] if self.eos_token_id is None else [self.eos_token_id]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *ids]))
        template = config.get("chat_template")
        if isinstance(template, list):  # several named ones: the default's
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        self.chat_template: str | None = template
        self._adds_bos = config.get("add_bos_token")
        self._added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        """Raises WorkspaceError when tokenizer.json is absent or cannot be read."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise WorkspaceError(f"{path} is missing: run 'turbotriton convert' again")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  tokenizers raises plain Exception
            raise WorkspaceError(f"{path} cannot be read: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        separate = folder / "chat_template.jinja"
        if separate.is_file():
            config["chat_template"] = separate.read_text(encoding="utf-8")
        return cls(tokenizer, config, _read_json(folder / "generation_config.json"))

    def _id_of(self, token: str | None) -> int | None:
        found = None if token is None else self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With special tokens: what the model was trained to see in front (BOS where its tokenizer adds one)."""
        ids = self._literal.encode(text, add_special_tokens=add_special_tokens)
        bos = self.bos_token_id
        if add_special_tokens and self._adds_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def protect(self, content: str) -> str:
        """`content` with placeholders for the special tokens that it spells: `encode` then takes those as text."""
        return self._literal.protect(content)

    def single_id(self, text: str) -> int | None:
        """The id of the token that is spelled `text` and stands for itself in any text: an added one, else None."""
        return self._added.get(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids outside the vocabulary (padding rows of the embedding) give nothing."""
        known = [token_id for token_id in ids if 0 <= token_id < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens))


class IncrementalDetokenizer:
    """Text deltas of a growing token sequence: their sum is the text that follows the prompt.

        ids    ... | context ....... | not yet emitted ......
                   ^ _begin          ^ _emitted          delta = decode(both) minus decode(context)

    Decoding a little context with the new ids keeps the space that decoders strip from a text's first token. A delta that would
    end inside a character (bytes still to come decode to a trailing U+FFFD) waits for the ids that complete it; `flush` gives
    what never was.
    """

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = list(prompt_ids[-CONTEXT_TOKENS:])
        self._begin = 0
        self._emitted = len(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids make certain. Several at once cost as much as one, unless there is a broken character in them."""
        if len(ids) > 1:
            self._ids += ids
            if text := self._take(final=False, whole=True):
                return text
            del self._ids[-len(ids) :]
        pieces = []
        for token_id in ids:
            self._ids.append(token_id)
            pieces.append(self._take(final=False))
        return "".join(pieces)

    def flush(self) -> str:
        """What was held back: incomplete bytes come as U+FFFD."""
        return self._take(final=True)

    def _take(self, *, final: bool, whole: bool = False) -> str:
        """whole: nothing, unless all of it is text. What a broken character looks like depends on where the ids were cut."""
        if self._emitted == len(self._ids):
            return ""
        context = self._tokenizer.decode(self._ids[self._begin : self._emitted], skip_special_tokens=self._skip)
        text = self._tokenizer.decode(self._ids[self._begin :], skip_special_tokens=self._skip)
        if not final and (text.endswith(REPLACEMENT) or len(text) <= len(context)):
            return ""
        if whole and REPLACEMENT in text[len(context) :]:
            return ""
        del self._ids[: self._begin]
        self._begin = self._emitted - self._begin
        self._emitted = len(self._ids)
        return text[len(context) :]


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json has a token as its text or as {"content": text, ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise WorkspaceError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise WorkspaceError(f"{path} must hold a JSON object")
    return content
