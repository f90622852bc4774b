"""A work dir's tokenizer as `transformers` loads it without network: `tokenizer.json` and `tokenizer_config.json`.

A `tokenizer.json` stays what it is, but for tokens that it would put around a text (the model has never seen them), and
lengths that it would cut or fill texts to. A SentencePiece model becomes one with the same ids. Its pieces then hold
real spaces in place of the mark that SentencePiece writes, so that a mark in a text is a character like others, as in
`data/tokenizer.py`.
"""

import json
import pathlib
import re
from typing import Any

from megatron_retro.data.tokenizer import Tokenizer, tokenizer_file
from megatron_retro.errors import UserError
from megatron_retro.interop.hugging_face import PROBES
from megatron_retro.reading import parse_json, read_text

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
_UNIGRAM, _BPE = 1, 2  # kinds of models
_MARK = "▁"


def save_tokenizer(file: pathlib.Path, directory: pathlib.Path, longest: int) -> None:
    """Write a tokenizer into a model's directory.

    Args:
        file: `.model` or `tokenizer.json`.
        longest: positions of the model.

    Raises:
        UserError: it cannot be converted to one with the same ids.
    """
    file = tokenizer_file(file)
    ours, is_json = Tokenizer.open(file), file.suffix == ".json"
    theirs = _without_frame(file) if is_json else converted(file)
    # SentencePiece reads no control piece from a text, nor does Megatron the end that GPT-2's files have as any other.
    theirs.encode_special_tokens = spells = not is_json or ours.eod not in theirs.get_added_tokens_decoder()
    for text in PROBES:
        found, expected = theirs.encode(text, add_special_tokens=True).ids, ours.encode([text])[0]
        if found != expected:
            raise UserError(
                f"--tokenizer-model {file} cannot be written as tokenizer.json: {text!r} has the ids {expected[:8]}… "
                f"in it, {found[:8]}… there"
            )
    theirs.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": theirs.id_to_token(ours.eod),
        "pad_token": theirs.id_to_token(ours.pad),
        "padding_side": "left",
        "split_special_tokens": spells,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def is_found(directory: pathlib.Path, ours: Tokenizer) -> bool:
    """Whether `AutoTokenizer` loads what was saved: for some kinds of models it insists on a tokenizer of its own."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(directory)
    return [loaded(text).input_ids for text in PROBES] == ours.encode(list(PROBES))


def _without_frame(file: pathlib.Path) -> Any:
    """A `tokenizer.json` that neither adds tokens nor cuts or fills texts."""
    import tokenizers

    values = parse_json(read_text(f"--tokenizer-model {file}", file))
    values.update({"truncation": None, "padding": None})
    if tokenizers.Tokenizer.from_file(str(file)).num_special_tokens_to_add(False):
        values["post_processor"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def converted(file: pathlib.Path) -> Any:
    """A SentencePiece model as a `tokenizers.Tokenizer`.

    Raises:
        UserError: it is of a kind that has no equal there.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(file.read_bytes())
    kind, spec = model.trainer_spec.model_type, model.normalizer_spec
    if kind not in (_UNIGRAM, _BPE) or model.trainer_spec.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise UserError(
            f"--tokenizer-model {file} is a SentencePiece model of a kind that no tokenizer.json equals; only unigram "
            "and BPE models with spaces before words can be exported"
        )
    pieces = [(piece.piece.replace(_MARK, " "), piece.score, piece.type) for piece in model.pieces]
    types = {type_ for *_, type_ in pieces}
    if _USER_DEFINED in types and (spec.remove_extra_whitespaces or spec.add_dummy_prefix):
        raise UserError(
            f"--tokenizer-model {file} has symbols of its user, and changes spaces around words; no tokenizer.json "
            "does both alike"
        )
    unknown = next(id for id, (_, _, type_) in enumerate(pieces) if type_ == _UNKNOWN)
    falls_back = _BYTE in types
    if kind == _UNIGRAM:
        vocabulary = [(piece, score) for piece, score, _ in pieces]
        backend = Backend(models.Unigram(vocabulary, unknown, falls_back))
    else:
        ids = {piece: id for id, (piece, _, _) in enumerate(pieces)}
        backend = Backend(
            models.BPE(ids, _merges(pieces), unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=falls_back)
        )
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if not falls_back:
        steps.append(normalizers.Replace(_MARK, " "))  # without bytes to spell it in, it is a space
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    backend.normalizer = normalizers.Sequence(steps)
    # A text may say what a control piece or a byte is called; cut behind the first letter, it is no such piece.
    names = [piece for piece, _, type_ in pieces if type_ in (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)]
    called = "|".join(f"{re.escape(name[:1])}(?={re.escape(name[1:])})" for name in names if len(name) > 1)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(called), "merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *strip])
    for piece, _, type_ in pieces:
        if type_ in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(piece, normalized=False, special=type_ != _USER_DEFINED)])
    return backend


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The pairs that make up pieces, the best piece first: what SentencePiece's BPE joins."""
    scores = {piece: score for piece, score, type_ in pieces if type_ == _NORMAL}
    pairs = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: -pair[0])]
