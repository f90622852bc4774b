"""A trained tokenizer keeps every character; others give what they are asked for or say what they lack."""

import json
import math
import random
import re

import pytest
import transformers
from conftest import stdlib_texts

from megatron_retro.data.tokenizer import Tokenizer, gpt2_json, train
from megatron_retro.errors import UserError


@pytest.fixture(scope="module")
def texts():
    return stdlib_texts(40)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("tokenizer") / "a.model"
    path.write_bytes(train(texts, 800))
    return Tokenizer.open(path)


def round_trip(tokenizer, texts):
    return tokenizer.decode(tokenizer.encode(texts))


def test_code_comes_back_as_it_was(trained, texts):
    assert round_trip(trained, texts) == texts


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "\n", "\t", "  two  spaces  ", "a\n\n\n\tb\r\nc", "nul \0 inside", "\u2028\x85\x0b\u00a0\u3000"),
        *("▁", "a ▁▁ b▁", "👩‍👩‍👧 😀 ﬁ e\u0301", "<eod> <pad> <unk> </s>", "\ufeff\uffff\U0010ffff", "x" * 5000),
    ],
)
def test_any_text_comes_back_as_it_was(trained, text):
    assert round_trip(trained, [text]) == [text]
    assert not {trained.eod, trained.pad} & set(trained.encode([text])[0])


def test_random_unicode_comes_back_as_it_was(trained):
    generator = random.Random(0)
    kinds = ((0, 0x80), (0, 0xD800), (0xE000, 0x110000), (9, 14), (32, 33), (0x2581, 0x2582))
    texts = ["".join(chr(generator.randrange(*generator.choice(kinds))) for _ in range(30)) for _ in range(500)]
    assert round_trip(trained, texts) == texts


def test_training_is_deterministic_and_special_ids_are_distinct(trained, texts):
    assert train(texts, 800) == train(texts, 800)
    assert trained.vocab_size == 800
    assert len({trained.eod, trained.pad, 0}) == 3


def test_special_ids_decode_to_nothing(trained):
    (row,) = trained.encode(["abc"])
    assert trained.decode([[trained.eod, *row, trained.eod, trained.pad, trained.pad]]) == ["abc"]


def test_little_text_gets_fewer_pieces_and_none_is_refused(tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(train(["ab ab ab cd"], 32000))
    assert 259 < Tokenizer.open(path).vocab_size < 300
    with pytest.raises(UserError, match="no tokenizer of --vocab-size 500"):
        train([], 500)
    with pytest.raises(UserError, match=r"--vocab-size 100 .*smaller than required_chars"):
        train(["abc"], 100)


def test_long_lines_are_learned_from(tmp_path, texts):
    """The trainer would skip a line beyond its limit without a word."""
    line = " ".join(" ".join(texts).split())
    path = tmp_path / "a.model"
    path.write_bytes(train([line], 800))
    assert len(Tokenizer.open(path).encode([line])[0]) < len(line) / 2


def hugging_face(path, special=("<|endoftext|>",)):
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet)
    model.train_from_iterator(stdlib_texts(5), trainer)
    model.enable_padding(length=64)
    model.enable_truncation(8)
    model.save(str(path))
    return path


def test_hugging_face_json(tmp_path, texts):
    tokenizer = Tokenizer.open(hugging_face(tmp_path / "tokenizer.json"))
    assert round_trip(tokenizer, [*texts[:5], "😀 \n\t x"]) == [*texts[:5], "😀 \n\t x"]
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (400, 0, 0)
    assert tokenizer.decode([[tokenizer.eod]]) == [""]


def test_unusable_models_are_refused(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"hello")
    (tmp_path / "bad.json").write_text("{}")
    for name, reason in (("bad.model", "not a SentencePiece"), ("bad.json", "not a tokenizer.json"), ("no", "no such")):
        with pytest.raises(UserError, match=reason):
            Tokenizer.open(tmp_path / name)
    with pytest.raises(UserError, match="has no end-of-document token"):
        Tokenizer.open(hugging_face(tmp_path / "plain.json", special=()))


# ------------------------------------------------------------------------------------------------ GPT-2's two files


def gpt2_files(directory):
    """`vocab.json` and `merges.txt` as GPT-2's were written, of a BPE trained here; <|endoftext|> is its last id."""
    model = json.loads(hugging_face(directory / "trained.json", special=()).read_text())["model"]
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return directory / "vocab.json", directory / "merges.txt"


def restated_gpt2(vocab_file, merge_file):
    """Byte-level BPE from its description: words, bytes as characters, and the first of the merges that fits."""
    vocab = json.loads(vocab_file.read_text())
    merges = merge_file.read_text(encoding="utf-8").splitlines()[1:]
    rank = {tuple(line.split()): number for number, line in enumerate(merges)}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(others)}

    def encode(text):
        ids = []
        for word in re.findall(r"'(?:[stmd]|re|ve|ll)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text):
            parts = [letters[byte] for byte in word.encode()]
            while len(parts) > 1:
                best = min(range(len(parts) - 1), key=lambda at: rank.get((parts[at], parts[at + 1]), math.inf))
                if (parts[best], parts[best + 1]) not in rank:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids += [vocab[part] for part in parts]
        return ids

    return encode


def test_gpt2_files_give_the_ids_of_byte_level_bpe(tmp_path, texts):
    files = gpt2_files(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(gpt2_json(*files))
    tokenizer, expected = Tokenizer.open(tmp_path / "tokenizer.json"), restated_gpt2(*files)
    some = [text[:3000] for text in texts[5:12]] + ["it's  we'll\t\n\n x_y 12ab — 数字 😀  ", "a <|endoftext|> b", ""]
    assert tokenizer.encode(some) == [expected(text) for text in some]
    assert round_trip(tokenizer, some) == some
    assert tokenizer.eod == tokenizer.vocab_size - 1 == len(json.loads(files[0].read_text())) - 1
    theirs = transformers.GPT2Tokenizer(vocab=str(files[0]), merges=str(files[1]))
    assert tokenizer.encode(some[:8]) == [theirs(text)["input_ids"] for text in some[:8]]


def test_a_directory_is_opened_by_the_file_in_it(tmp_path, trained, texts):
    assert Tokenizer.open(hugging_face(tmp_path / "tokenizer.json").parent).vocab_size == 400
    with pytest.raises(UserError, match=r"directory without tokenizer\.json"):
        (tmp_path / "empty").mkdir()
        Tokenizer.open(tmp_path / "empty")
    (tmp_path / "two").mkdir()
    gpt2_files(tmp_path / "two")
    with pytest.raises(UserError, match="--vocab-file and --merge-file"):
        Tokenizer.open(tmp_path / "two")


def test_gpt2_files_that_are_none_are_refused(tmp_path):
    vocab, merges = gpt2_files(tmp_path)

    def refused(vocab_text=None, merges_text=None):
        one, two = tmp_path / "one", tmp_path / "two"
        one.write_text(vocab_text or vocab.read_text())
        two.write_text(merges_text or merges.read_text())
        with pytest.raises(UserError) as caught:
            gpt2_json(one, two)
        return str(caught.value)

    assert "is no vocab.json" in refused(vocab_text="[1, 2]")
    assert "no id of its own" in refused(vocab_text='{"a": 1, "b": 1}')
    assert "two:3: 'a' is no pair" in refused(merges_text="#version\na b\na\n")
    assert "do not belong together" in refused(merges_text="#version\nnot there\n")
