"""The chunk table against loops over documents; nothing is read past a document's end."""

import numpy as np
import pytest
from conftest import stdlib_texts, write_jsonl

from megatron_retro.data.chunks import ChunkTable, Corpus, ranges
from megatron_retro.data.documents import Source, blocks
from megatron_retro.data.tokenize import (
    check_token_ids,
    count_parts,
    merge_parts,
    sample_texts,
    token_dtype,
    write_part,
)
from megatron_retro.data.tokenizer import Tokenizer, train
from megatron_retro.errors import UserError

LENGTHS = (5, 1, 0, 13, 7, 1_000_003, 6)
C, PAD = 7, 99


def write_dataset(prefix, documents, dtype=np.uint16):
    """Megatron's `.bin/.idx`; a document is a list of sequences."""
    from megatron_retro.mcore import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.concatenate([np.zeros(0, dtype), *sequences]), [len(row) for row in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def tokens_of(length, seed=0):
    return np.random.default_rng([seed, length]).integers(0, 90, length)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpora")
    first = write_dataset(directory / "a", [[tokens_of(length)] for length in LENGTHS])
    second = write_dataset(directory / "b", [[tokens_of(9), tokens_of(8)], [tokens_of(2)]], np.int32)
    return ChunkTable([Corpus.open("a", first), Corpus.open("b", second, 2.0)], C)


DOCUMENTS = [tokens_of(length) for length in LENGTHS] + [np.append(tokens_of(9), tokens_of(8)), tokens_of(2)]


def test_documents_of_0_1_and_a_million_tokens_have_their_chunks(table):
    expected = [-(-len(tokens) // C) for tokens in DOCUMENTS]
    assert np.diff(table.first_chunk).tolist() == expected
    assert table.num_tokens == sum(map(len, DOCUMENTS))
    assert table.corpus_chunks.tolist() == [0, sum(expected[:7]), sum(expected)]


@pytest.mark.parametrize("num_tokens", [C, C + 1, 2 * C])
def test_a_row_stops_at_its_documents_end(table, num_tokens):
    offsets = [(number, begin) for number, tokens in enumerate(DOCUMENTS) for begin in range(0, len(tokens), C)]
    chunks = np.append(np.arange(0, 20), np.arange(table.num_chunks - 20, table.num_chunks))
    rows, lengths = table.tokens(chunks, num_tokens, PAD)
    for chunk, row, length in zip(chunks, rows, lengths, strict=True):
        number, begin = offsets[chunk]
        expected = DOCUMENTS[number][begin : begin + num_tokens]
        assert length == len(expected)
        assert row.tolist() == [*expected, *[PAD] * (num_tokens - len(expected))]
        assert table.document(chunk) == number
        assert table.is_last(chunk) == (begin + C >= len(DOCUMENTS[number]))


def test_no_chunk_reads_nothing_and_a_wrong_id_raises(table):
    rows, lengths = table.tokens(np.array([-1, 0]), C, PAD)
    assert lengths.tolist() == [0, 5] and (rows[0] == PAD).all()
    for wrong in (-2, table.num_chunks):
        with pytest.raises(IndexError):
            table.tokens(np.array([wrong]), C, PAD)


def test_splits_are_disjoint_complete_and_stay_when_the_corpus_grows():
    def splits(num_documents):
        lengths = np.ones(num_documents, np.int64)
        corpus = Corpus("a", np.zeros(num_documents, np.uint16), np.arange(num_documents), lengths, 1.0)
        table = ChunkTable([corpus], C)
        return [table.documents_in(split, (90, 5, 5)) for split in ("train", "valid", "test")]

    few, many = splits(1000), splits(1500)
    assert np.sort(np.concatenate(few)).tolist() == list(range(1000))
    assert [abs(len(part) - expected) <= 2 for part, expected in zip(few, (900, 50, 50), strict=True)] == [True] * 3
    for part, grown in zip(few, many, strict=True):
        assert part.tolist() == grown[grown < 1000].tolist()


def test_missing_and_cut_off_corpora_are_refused(tmp_path):
    prefix = write_dataset(tmp_path / "a", [[tokens_of(20)]])
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(20)
    with pytest.raises(UserError, match=r"a.idx names tokens behind the 10 of .*a.bin"):
        Corpus.open("a", prefix)
    with pytest.raises(UserError, match=r"no file .*none\.bin"):
        Corpus.open("none", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"empty\.bin is empty"):
        Corpus.open("empty", write_dataset(tmp_path / "empty", []))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # megatron-core's __del__ after a failure
def test_an_idx_of_another_kind_is_refused(tmp_path):
    for ending in (".bin", ".idx"):
        (tmp_path / f"a{ending}").write_bytes(b"something else entirely")
    with pytest.raises(UserError, match=r"a\.idx is not Megatron's"):
        Corpus.open("a", str(tmp_path / "a"))


def test_ranges():
    assert ranges(np.array([3, 5, 9]), np.array([5, 5, 12])).tolist() == [3, 4, 9, 10, 11]


# ------------------------------------------------------------------------------------------------ tokenizing


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "a.model"
    path.write_bytes(train(stdlib_texts(10), 600))
    return Tokenizer.open(path)


def test_parts_merge_to_one_document_a_sequence_ending_with_eod(tmp_path, tokenizer):
    texts = ["x", *stdlib_texts(6), "y = 1\n" * 200_000]
    records = list(Source.find(str(write_jsonl(tmp_path / "a.jsonl", [*texts, ""]))).records("text"))
    merged = []
    for size in (3, 100):
        parts = [tmp_path / f"{size}" / f"{number:08d}" for number in range(-(-len(records) // size))]
        for part, block in zip(parts, blocks(iter(records), max_records=size), strict=True):
            write_part(part, block, tokenizer, "text", strict=False)
        merge_parts(parts, tmp_path / f"merged{size}", token_dtype(tokenizer.vocab_size))
        counts = count_parts(parts)
        assert (counts["documents"], counts["skipped"]) == (len(texts), {"empty text": 1})
        merged.append([(tmp_path / f"merged{size}{end}").read_bytes() for end in (".bin", ".idx")])
    assert merged[0] == merged[1]
    corpus = Corpus.open("a", str(tmp_path / "merged3"))
    assert corpus.length[-1] > 500_000 and counts["tokens"] == corpus.length.sum()
    for text, start, length in zip(texts, corpus.start, corpus.length, strict=True):
        row = corpus.tokens[start : start + length].tolist()
        assert row[-1] == tokenizer.eod and tokenizer.decode([row]) == [text]


def test_strict_names_the_file_and_the_line(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": \xff}\n')
    block = list(Source.find(str(path)).records("text"))
    with pytest.raises(UserError, match=rf"--strict: {path}:2: invalid UTF-8"):
        write_part(tmp_path / "part", block, tokenizer, "text", strict=True)


def test_ids_beyond_the_vocabulary_are_refused_with_both_numbers():
    tokens = np.arange(3_000_000, dtype=np.int32) % 500
    check_token_ids("a", tokens, 500)
    tokens[-1] = 712
    with pytest.raises(UserError, match="corpus 'a' holds token id 712, --tokenizer-model has 500 ids"):
        check_token_ids("a", tokens, 500)


def test_the_tokenizers_sample_is_bounded_random_and_reproducible(tmp_path):
    texts = [f"document {number}" for number in range(200)]
    source = Source.find(str(write_jsonl(tmp_path / "a.jsonl", texts)))
    sample = sample_texts(source.records("text"), "text", 1, 2000)
    assert sample == sample_texts(source.records("text"), "text", 1, 2000)
    assert sample != sample_texts(source.records("text"), "text", 2, 2000)
    assert 20 < len(sample) < 100 and set(sample) < set(texts)
    assert max(int(text.split()[1]) for text in sample) > 150
