"""A trained tokenizer keeps every character; others give what they are asked for or say what they lack."""

import random

import pytest
from conftest import stdlib_texts

from megatron_retro.data.tokenizer import Tokenizer, train
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
