"""Tokenizers: text to token ids and back.

A SentencePiece model (one trained here keeps every character: `decode(encode(x)) == x`) or a Hugging Face
`tokenizer.json`, which GPT-2's vocabulary and merges are made into.
"""

import abc
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator

from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json, read_text

EOD_NAMES = ("<eod>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
PAD_NAMES = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]")

PIECE = 1 << 20  # characters that are encoded at once: the libraries take dozens of times their memory

_SPACE_MARK = "▁"  # SentencePiece writes a space so, and reads every such mark as a space
_PIECE_CHARACTERS = 1000  # of one training sentence; the trainer skips longer ones than its limit without a word


class Tokenizer(abc.ABC):
    """What preprocessing and generation need of a tokenizer.

    Attributes:
        vocab_size: number of ids.
        eod: id that ends every document.
        pad: id that fills rows; `eod` when the model has none.
    """

    vocab_size: int
    eod: int
    pad: int

    @staticmethod
    def open(path: str | os.PathLike) -> "Tokenizer":
        """Open a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a directory that holds one of them.

        Raises:
            UserError: not readable as either, or it has no end-of-document id.
        """
        path = tokenizer_file(pathlib.Path(path))
        return JsonTokenizer(path) if path.suffix == ".json" else PieceTokenizer(path)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, nothing added at either end; those of a long one piece by piece (see `pieces`)."""
        if all(len(text) <= PIECE for text in texts):
            return self._encode(texts)
        return [[id for piece in pieces(text) for id in self._encode([piece])[0]] for text in texts]

    @abc.abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """`encode` of texts of at most `PIECE` characters."""

    @abc.abstractmethod
    def decode(self, tokens: list[list[int]]) -> list[str]:
        """Text of each row of ids; eod, pad and other control ids become nothing."""


class PieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, path: pathlib.Path):
        import sentencepiece

        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.vocab_size = model.vocab_size()
            names = {model.id_to_piece(id): id for id in range(self.vocab_size) if model.is_control(id)}
        except (OSError, RuntimeError, ValueError) as error:  # of pieces that are no text too
            raise UserError(f"--tokenizer-model {path} is not a SentencePiece model ({error})") from None
        self.eod = _named(names, EOD_NAMES, model.eos_id(), path)
        self.pad = _named(names, PAD_NAMES, model.pad_id() if model.pad_id() >= 0 else self.eod, path)
        self._control = {*names.values(), self.eod, self.pad}
        mark = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark = mark if all(model.is_byte(id) for id in mark) else None

    def _encode(self, texts: list[str]) -> list[list[int]]:
        rows = self._model.encode(texts)
        for number, text in enumerate(texts):
            if _SPACE_MARK in text and self._mark:
                rows[number] = self._encode_around_marks(text, self._mark)
        return rows

    def _encode_around_marks(self, text: str, mark: list[int]) -> list[int]:
        """Spell the space mark in bytes, else it would come back as a space."""
        first, *others = self._model.encode(text.split(_SPACE_MARK))
        return first + [id for other in others for id in mark + other]

    def decode(self, tokens: list[list[int]]) -> list[str]:
        return self._model.decode([[id for id in row if id not in self._control] for row in tokens])


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: pathlib.Path):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"--tokenizer-model {path} needs the package tokenizers: pip install tokenizers") from None
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"--tokenizer-model {path} is not a tokenizer.json ({error})") from None
        self._model.no_padding()
        self._model.no_truncation()
        names = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(names.values(), default=-1) + 1  # ids may have holes
        if self.vocab_size > 1 << 31:
            raise UserError(f"--tokenizer-model {path} has the id {self.vocab_size - 1}; ids are stored in 31 bits")
        self.eod = _named(names, EOD_NAMES, -1, path)
        self.pad = _named(names, PAD_NAMES, self.eod, path)
        self._control = {self.eod, self.pad}

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [row.ids for row in self._model.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: list[list[int]]) -> list[str]:
        kept = [[id for id in row if id not in self._control] for row in tokens]
        return self._model.decode_batch(kept, skip_special_tokens=True)


_FILES = ("tokenizer.json", "tokenizer.model")


def tokenizer_in(directory: pathlib.Path) -> pathlib.Path | None:
    """The `tokenizer.json` or SentencePiece model in a model's directory, if there is one."""
    return next((directory / name for name in _FILES if (directory / name).is_file()), None)


def tokenizer_file(path: pathlib.Path) -> pathlib.Path:
    """`path`, or of a Hugging Face directory the tokenizer's file in it.

    Raises:
        UserError: there is none.
    """
    file = tokenizer_in(path) or path
    if file.is_dir():
        way_out = "; give them as --vocab-file and --merge-file" if (path / "merges.txt").is_file() else ""
        raise UserError(f"--tokenizer-model {path} is a directory without {' or '.join(_FILES)}{way_out}")
    if not file.is_file():
        raise UserError(f"--tokenizer-model {path}: no such file")
    return file


def gpt2_json(vocab_file: pathlib.Path, merge_file: pathlib.Path) -> bytes:
    """GPT-2's byte-level BPE as the content of a `tokenizer.json`, with the ids of Megatron's GPT2BPETokenizer.

    Args:
        vocab_file: a JSON object, token -> id.
        merge_file: a header line, then a pair of tokens a line, the first one to be merged first.

    Raises:
        UserError: they are not that, or do not belong together.
    """
    given = f"--vocab-file {vocab_file} --merge-file {merge_file}"
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{given} needs the package tokenizers: pip install tokenizers") from None
    try:
        vocab = parse_json(read_text(f"--vocab-file {vocab_file}", vocab_file))
        ids = list(vocab.values())
        if not all(type(id) is int and id >= 0 for id in ids) or len(set(ids)) < len(ids):
            raise ValueError("a token has no id of its own")
    except (ValueError, AttributeError) as error:
        raise UserError(f"--vocab-file {vocab_file} is no vocab.json, token -> id ({error})") from None
    # As Megatron reads it: the first line and what stands behind the last end of line are no merges, whatever it is.
    lines = read_text(f"--merge-file {merge_file}", merge_file).split("\n")[1:-1]
    merges = [tuple(line.split()) for line in lines]
    wrong = next((number for number, merge in enumerate(merges, 2) if len(merge) != 2), 0)
    if wrong:
        raise UserError(f"--merge-file {merge_file}:{wrong}: {lines[wrong - 2]!r} is no pair of tokens")
    try:
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))  # type: ignore[arg-type]
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{given} do not belong together ({error})") from None
    # <|endoftext|> stays an entry as any other: where it stands in a text, that is spelled out, as Megatron does.
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return json.dumps(parse_json(model.to_str()), ensure_ascii=False).encode()


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most `PIECE` characters, each but the first beginning with a space behind a word.

    Almost no tokenizer joins a word with the space behind it, so the pieces have the tokens of the whole text, but for
    ties that sums over a longer text round otherwise. Where no such space is, a piece ends in the midst of a word.
    """
    begin = 0
    while len(text) - begin > PIECE:
        end = text.rfind(" ", begin + 1, begin + PIECE + 1)
        while end > 0 and text[end - 1].isspace():
            end = text.rfind(" ", begin + 1, end)
        end = end if end > 0 else begin + PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _named(names: dict[str, int], wanted: tuple[str, ...], otherwise: int, path: pathlib.Path) -> int:
    found = next((names[name] for name in wanted if name in names), otherwise)
    if found < 0:
        raise UserError(f"--tokenizer-model {path} has no end-of-document token: none of {', '.join(wanted)}")
    return found


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece unigram model that keeps every character of any text.

    Args:
        texts: the sample; the same texts give the same bytes.
        vocab_size: pieces wanted; a small sample gets fewer.

    Returns:
        The content of a `.model` file.

    Raises:
        UserError: there is no text, or `vocab_size` has no room for 256 bytes, 3 special pieces and the alphabet.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            eos_piece=EOD_NAMES[0],
            pad_id=2,
            pad_piece=PAD_NAMES[0],
            max_sentence_length=4 * _PIECE_CHARACTERS,
            shuffle_input_sentence=False,
            num_threads=1,  # the sums of several threads would round differently from run to run
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].split("] ")[-1]
        raise UserError(
            f"no tokenizer of --vocab-size {vocab_size} can be trained on this text ({reason}); "
            "give more text, another --vocab-size, or a --tokenizer-model"
        ) from None
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for begin in range(0, len(text), _PIECE_CHARACTERS):
            yield text[begin : begin + _PIECE_CHARACTERS]
