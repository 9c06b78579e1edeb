"""Special tokens that somebody wrote into a text are text: they must not become the control tokens of the same spelling.

    content --protect--> content with placeholders --template--> rendered text --encode--> ids
                                                                  |  placeholders: the spelling's ordinary tokens
                                                                  '- every other special token: the template's, a control token

Most contents hold none; they take the tokenizer's plain way. Otherwise a copy of the tokenizer is made (once) whose control tokens
have secret spellings: the template's are renamed to those, the content's stay as they are and are then nothing special to it.
"""

import json
import re
import secrets

from tokenizers import Tokenizer

__all__ = ["LiteralEncoder"]


class LiteralEncoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._secret = secrets.token_hex(8)
        special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._special: dict[str, int] = {text: index for text, index in special.items() if text}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._placeholder = re.compile(f"\ue000{self._secret}-([0-9]+)\ue001")
        self._renamed: Tokenizer | None = None
        self._to_id: dict[int, int] = {}

    def protect(self, content: str) -> str:
        """`content` with a placeholder for every special token that it spells."""
        if self._find is None:
            return content
        return self._find.sub(lambda found: f"\ue000{self._secret}-{self._special[found[0]]}\ue001", content)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._find is None or self._secret not in text:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        if self._renamed is None:
            self._renamed = self._rename()
        spelling = {index: content for content, index in self._special.items()}
        named = self._find.sub(lambda found: self._name(self._special[found[0]]), text)
        meant = self._placeholder.sub(lambda found: spelling[int(found[1])], named)
        ids = self._renamed.encode(meant, add_special_tokens=add_special_tokens).ids
        return [self._to_id.get(token_id, token_id) for token_id in ids]

    def _name(self, index: int) -> str:
        return f"\ue002{self._secret}-{index}\ue003"

    def _rename(self) -> Tokenizer:
        """The copy. Its vocabulary is renamed too: ids stay, and no merge or unigram finds the old spelling whole."""
        content = json.loads(self._tokenizer.to_str())
        names = {text: self._name(index) for text, index in self._special.items()}
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(text, text): index for text, index in model["vocab"].items()}
        else:  # unigram: [piece, score]
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        renamed = Tokenizer.from_str(json.dumps(content))
        for text, index in self._special.items():
            found = renamed.token_to_id(names[text])
            if found is not None:
                self._to_id[found] = index
        return renamed
