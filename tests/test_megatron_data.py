"""Corpora as Megatron-LM writes them, byte by byte: types, documents of several sequences, blends, tokenizers."""

import json
import shutil
import struct

import numpy as np
import pytest
from conftest import build, stdlib_texts
from megatron_files import DTYPES, write_corpus
from test_tokenizer import gpt2_files, hugging_face

from megatron_retro.data.chunks import ChunkTable, Corpus, sequences
from megatron_retro.data.samples import Samples
from megatron_retro.data.tokenizer import Tokenizer, gpt2_json, train
from megatron_retro.errors import UserError
from megatron_retro.workdir import WorkDir

TOKENS_ONLY = ("--retro-tasks", "tokenize,db-build", "--retro-chunk-length", "5")

# As --split-sentences --append-eod writes them (0 ends a document), without eod, of one token, of none.
DOCUMENTS = [[[1, 2, 3], [4], [5, 6, 0]], [[7, 8]], [[9]], [[]], [[10, 11, 12, 13], [14, 15, 0]], [], [[16, 0]]]


def joined(documents):
    return [[id for sequence in document for id in sequence] for document in documents]


@pytest.mark.parametrize("code", DTYPES)
def test_several_sequences_are_one_document_in_every_type(tmp_path, code):
    prefix = write_corpus(tmp_path / "a_text_sentence", DOCUMENTS, code)
    corpus = Corpus.open("a", prefix)
    assert corpus.tokens.dtype == DTYPES[code]
    places = zip(corpus.start, corpus.start + corpus.length, strict=True)
    found = [corpus.tokens[begin:end].tolist() for begin, end in places]
    assert found == joined(DOCUMENTS)
    table = ChunkTable([corpus], 5)
    tokens, lengths = table.tokens(np.arange(table.num_chunks), 5, 99)
    rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    assert rows == [row[begin : begin + 5] for row in joined(DOCUMENTS) for begin in range(0, len(row), 5)]
    begin, length, first = sequences(prefix)
    assert length.tolist() == [len(row) for document in DOCUMENTS for row in document]
    assert begin.tolist() == np.cumsum([0, *length[:-1]]).tolist() and first.tolist() == [0, 3, 4, 5, 6, 8, 8, 9]


def test_a_multimodal_or_real_valued_corpus_is_told_from_one_of_tokens(tmp_path):
    prefix = write_corpus(tmp_path / "a", DOCUMENTS)
    with open(f"{prefix}.idx", "ab") as file:
        file.write(bytes(9))  # a mode of each sequence, which only multimodal datasets have
    assert Corpus.open("a", prefix).length.tolist() == [len(row) for row in joined(DOCUMENTS)]
    for code in (6, 7):  # float64, float32
        header = bytearray((tmp_path / "a.idx").read_bytes())
        header[17] = code
        (tmp_path / "a.idx").write_bytes(header)
        with pytest.raises(UserError, match=f"token type {code}, not"):
            Corpus.open("a", prefix)


def test_megatrons_own_reader_agrees(tmp_path):
    """So that what is written here is the format."""
    from megatron_retro.mcore import IndexedDataset

    prefix = write_corpus(tmp_path / "a", DOCUMENTS, 4)
    dataset = IndexedDataset(prefix)
    assert [dataset[number].tolist() for number in range(9)] == [row for document in DOCUMENTS for row in document]
    assert dataset.document_indices.tolist() == [0, 3, 4, 5, 6, 8, 8, 9]
    assert (tmp_path / "a.idx").read_bytes()[:18] == b"MMIDIDX\0\0" + struct.pack("<QB", 1, 4)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Name -> (flags, the file that it is opened by)."""
    path = tmp_path_factory.mktemp("tokenizers")
    vocab, merges = gpt2_files(path)
    (path / "gpt2.json").write_bytes(gpt2_json(vocab, merges))
    (path / "a.model").write_bytes(train(stdlib_texts(10), 500))
    (path / "hf").mkdir()
    hugging_face(path / "hf" / "tokenizer.json")
    return {
        "GPT2BPETokenizer": (("--vocab-file", str(vocab), "--merge-file", str(merges)), path / "gpt2.json"),
        "SentencePieceTokenizer": (("--tokenizer-model", str(path / "a.model")), path / "a.model"),
        "HuggingFaceTokenizer": (("--tokenizer-model", str(path / "hf")), path / "hf" / "tokenizer.json"),
    }


@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_a_blend_is_used_in_place_with_the_tokenizer_that_made_it(tmp_path, tokenizers, kind):
    flags, file = tokenizers[kind]
    tokenizer = Tokenizer.open(file)
    texts = [text[:300] for text in stdlib_texts(24)]
    rows = [[*row, tokenizer.eod] for row in tokenizer.encode(texts)]
    wiki = write_corpus(tmp_path / "wiki_text_document", [[row] for row in rows[:16]], 8)
    books = write_corpus(tmp_path / "books_text_sentence", [[row[:9], row[9:]] for row in rows[16:]], 4)
    build(tmp_path / "work", "--data-path", "0.75", wiki, "0.25", books, *flags, "--split", "100,0,0", *TOKENS_ONLY)
    work = WorkDir(tmp_path / "work")
    facts, table = work.facts("tokenizer"), ChunkTable.open(work)
    assert (work.path / facts["file"]).read_bytes() == file.read_bytes()
    assert (facts["vocab_size"], facts["eod"], facts["pad"]) == (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad)
    assert [(corpus.name, corpus.weight) for corpus in table.corpora] == [
        ("wiki_text_document", 0.75),
        ("books_text_sentence", 0.25),
    ]
    documents = [table.tokens(np.array([first]), 10_000, 0) for first in table.first_chunk[:-1]]
    assert [row[0, : length[0]].tolist() for row, length in documents] == rows
    weights = {corpus.name: corpus.weight for corpus in table.corpora}
    samples = Samples(table, split="train", split_weights=(1, 0, 0), corpus_weights=weights, chunks_a_sample=2, seed=1,
                      pad=0, num_samples=40)  # fmt: skip
    of_wiki = sum(int(samples.chunks(number)[0]) < table.corpus_chunks[1] for number in range(40))
    assert of_wiki == 30
    before = work.manifest
    build(work.path, "--data-path", "0.75", wiki, "0.25", books, *flags, *TOKENS_ONLY)  # all is there
    assert WorkDir(work.path).manifest == before


def test_another_tokenizer_and_half_of_one_are_refused(tmp_path, tokenizers):
    flags, _ = tokenizers["GPT2BPETokenizer"]
    prefix = write_corpus(tmp_path / "a", [[[1, 2, 450]]])
    with pytest.raises(UserError, match=r"token id 450, .* has 401 ids"):
        build(tmp_path / "work", "--data-path", prefix, *flags, *TOKENS_ONLY)
    assert not (tmp_path / "work" / "tokenizer").exists()
    with pytest.raises(UserError, match="--vocab-file is given alone"):
        build(tmp_path / "work", "--data-path", prefix, *flags[:2], *TOKENS_ONLY)
    with pytest.raises(UserError, match="are two tokenizers; give one"):
        build(tmp_path / "work", "--data-path", prefix, *flags, "--tokenizer-model", "x", *TOKENS_ONLY)
    with pytest.raises(UserError, match=r"--merge-file \S+none: no such file"):
        build(tmp_path / "work", "--data-path", prefix, *flags[:3], str(tmp_path / "none"), *TOKENS_ONLY)
    with pytest.raises(UserError, match="--data-path needs --tokenizer-model, or --vocab-file and --merge-file"):
        build(tmp_path / "work", "--data-path", prefix, *TOKENS_ONLY)
    write_corpus(tmp_path / "a", [[[1, 2, 3]] * 20])
    build(tmp_path / "work", "--data-path", prefix, *flags, *TOKENS_ONLY)
    other = shutil.copy(flags[1], tmp_path / "vocab.json")
    (tmp_path / "vocab.json").write_text(json.dumps({**json.loads((tmp_path / "vocab.json").read_text()), "xyz": 900}))
    with pytest.raises(UserError, match=r"--vocab-file \S+ --merge-file \S+ is .* was made with .*leave the flag out"):
        build(tmp_path / "work", "--vocab-file", str(other), *flags[2:], *TOKENS_ONLY)
