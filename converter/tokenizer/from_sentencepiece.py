"""tokenizer.model (SentencePiece, BPE or unigram) to a `tokenizers.Tokenizer` with the same ids.

The model file is a protobuf message; the few fields needed are read from its wire format, because the generated module that
sentencepiece ships demands a newer protobuf runtime than grpc's.

    SentencePiece                            tokenizers
    add_dummy_prefix, escape_whitespaces     Prepend "▁", Replace " " by "▁"; on the way back Strip one space
    BPE scores                               merges: every split of a piece into two pieces, best score first
    byte_fallback                            the same
    USER_DEFINED pieces                      added tokens, matched before anything else
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from turbotriton.contract.errors import CheckpointError

from .sample import check_same_ids

__all__ = ["tokenizer_from_sentencepiece"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
SPACE = "▁"


@dataclass(slots=True)
class _Model:
    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # (piece, score, type)
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bytes = b""


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, int | bytes) of one protobuf message. Raises ValueError or IndexError on corrupt input."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) if wire != 2 else varint()
        if size is None or position + size > len(data):
            raise ValueError("corrupt message")
        yield key >> 3, data[position : position + size]
        position += size


def _parse(path: Path) -> _Model:
    model = _Model()
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                model.pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
                model.model_type, model.byte_fallback = trainer.get(3, UNIGRAM), bool(trainer.get(35, 0))
            elif number == 3:
                normalizer = dict(_fields(value))
                model.charsmap = normalizer.get(2, b"")
                model.add_dummy_prefix = bool(normalizer.get(3, 1))
                model.remove_extra_whitespaces = bool(normalizer.get(4, 1))
    except (OSError, ValueError, IndexError, KeyError, struct.error, AttributeError):
        raise CheckpointError(f"{path}: is no SentencePiece model; download it again") from None
    if not model.pieces:
        raise CheckpointError(f"{path}: is no SentencePiece model: it holds no pieces; download it again")
    if model.model_type not in (UNIGRAM, BPE):
        raise CheckpointError(f"{path}: expected a BPE or unigram model, found type {model.model_type}")
    return model


def tokenizer_from_sentencepiece(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """`config` is tokenizer_config.json: added tokens, add_bos_token (default true), add_eos_token, `legacy`.

    Raises CheckpointError when the file is corrupt or the ids differ from SentencePiece's on a text.
    """
    model = _parse(path)
    _check_added_tokens(config, path)
    try:
        reference = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise CheckpointError(f"{path}: is no SentencePiece model ({error}); download it again") from None
    _rename_pieces(model, config)
    legacy = config.get("legacy", True) is not False
    unknown = next((piece for piece, _, kind in model.pieces if kind == UNKNOWN), None)
    tokenizer = Tokenizer(_bpe(model, unknown) if model.model_type == BPE else _unigram(model))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _spaces(model, legacy=legacy)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    _add_tokens(tokenizer, model, config, path)
    # The newer rule never doubles a space that a text begins with; SentencePiece and the legacy rule do.
    check_same_ids(tokenizer, reference.encode, path, leading_space=legacy or not model.add_dummy_prefix)
    _add_post_processor(tokenizer, reference, config)
    return tokenizer


def _bpe(model: _Model, unknown: str | None) -> models.BPE:
    """Pieces that text can turn into take part in merges; control, byte and unused pieces only have an id."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    scores = {piece: score for piece, score, kind in model.pieces if kind in (NORMAL, USER_DEFINED)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score, kind in model.pieces:
        if kind == NORMAL:
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in scores and right in scores:
                    merges.append((-score, vocab[left], vocab[right], left, right))
    merges.sort()
    return models.BPE(
        vocab=vocab,
        merges=[(left, right) for *_, left, right in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: _Model) -> models.Unigram:
    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    return models.Unigram([(piece, score) for piece, score, _ in model.pieces], unknown, model.byte_fallback)


def _spaces(model: _Model, *, legacy: bool) -> tuple[Any, Any]:
    """(normalizer, pre_tokenizer). Hugging Face's legacy rule puts the prefix space before every stretch of text between special
    tokens, the newer one only before the first."""
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    prefix_in_normalizer = model.add_dummy_prefix and legacy
    if prefix_in_normalizer:
        steps.append(normalizers.Prepend(SPACE))
    if legacy or not model.add_dummy_prefix:
        steps.append(normalizers.Replace(" ", SPACE))
        return normalizers.Sequence(steps), None
    scheme = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    return (normalizers.Sequence(steps) if steps else None), scheme


def _check_added_tokens(config: Mapping[str, Any], path: Path) -> None:
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(
        str(key).isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str) for key, entry in added.items()
    ):
        raise CheckpointError(
            f"{path.with_name('tokenizer_config.json')}: added_tokens_decoder: expected {{id: {{content: text}}}}"
        )


def _rename_pieces(model: _Model, config: Mapping[str, Any]) -> None:
    """InternLM2 gives unused pieces a new text in added_tokens_decoder: the id stays, the text becomes the config's."""
    for text_id, entry in (config.get("added_tokens_decoder") or {}).items():
        if int(text_id) < len(model.pieces) and model.pieces[int(text_id)][0] != entry["content"]:
            model.pieces[int(text_id)] = (entry["content"], 0.0, CONTROL if entry.get("special") else USER_DEFINED)


def _add_tokens(tokenizer: Tokenizer, model: _Model, config: Mapping[str, Any], path: Path) -> None:
    """Control pieces become special tokens, user-defined ones are matched first; then tokenizer_config.json's own, by id."""
    added = {int(text_id): entry for text_id, entry in (config.get("added_tokens_decoder") or {}).items()}
    for i, (piece, _, kind) in enumerate(model.pieces):
        if i not in added and kind in (CONTROL, UNKNOWN, USER_DEFINED):
            added[i] = {"content": piece, "special": kind != USER_DEFINED, "normalized": SPACE in piece}
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for i in sorted(added):
        flags = {name: bool(added[i].get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        token = AddedToken(added[i]["content"], **flags)
        if i >= len(model.pieces):  # new ids: in order, whatever their kind
            tokenizer.add_special_tokens([token]) if flags["special"] else tokenizer.add_tokens([token])
            found = tokenizer.token_to_id(token.content)
            if found != i:
                raise CheckpointError(f"{path}: added token {token.content!r}: expected id {i}, found {found}; its ids have gaps")
        else:
            (special if flags["special"] else plain).append(token)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_post_processor(tokenizer: Tokenizer, reference: Any, config: Mapping[str, Any]) -> None:
    """BOS in front (the default, as in LMDeploy and Llama's tokenizer), EOS behind where asked."""
    bos, eos = reference.bos_id(), reference.eos_id()
    parts, special = ["$A"], []
    if config.get("add_bos_token", True) and bos >= 0:
        parts.insert(0, reference.id_to_piece(bos))
        special.append((reference.id_to_piece(bos), bos))
    if config.get("add_eos_token", False) and eos >= 0:
        parts.append(reference.id_to_piece(eos))
        special.append((reference.id_to_piece(eos), eos))
    if special:
        single = " ".join(parts)
        pair = f"{single} {single.replace('$A', '$B')}".replace("$B", "$B:1")
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
