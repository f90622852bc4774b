"""Samples: order, labels, padding, and which neighbors a sample may read."""

import numpy as np
import pytest
import torch

from megatron_retro.data.chunks import ChunkTable, Corpus
from megatron_retro.data.samples import Samples, Stream, chunks_that_read, interleave
from megatron_retro.errors import UserError

CHUNK, CHUNKS, PAD = 5, 3, 999
ALL = (1.0, 0.0, 0.0)


def corpus(name: str, lengths: list[int], first_token: int = 0) -> Corpus:
    length = np.array(lengths, np.int64)
    start = np.append(0, np.cumsum(length)[:-1])
    return Corpus(name, np.arange(first_token, first_token + length.sum(), dtype=np.int32), start, length, 1.0)


class Fixed:
    """Neighbors as given, [num_chunks, K_saved]."""

    def __init__(self, ids: np.ndarray):
        self._ids, self.num_neighbors = ids, ids.shape[1]

    def ids(self, chunks: np.ndarray) -> np.ndarray:
        return self._ids[chunks]


def samples(table: ChunkTable, **changes: object) -> Samples:
    settings: dict = dict(
        split="train", split_weights=ALL, corpus_weights=None, chunks_a_sample=CHUNKS, seed=7, pad=PAD
    )
    return Samples(table, **{**settings, **changes})


@pytest.fixture
def table() -> ChunkTable:
    return ChunkTable([corpus("a", [13, 5, 1, 22, 0, 7, 31])], CHUNK)


def test_an_epoch_reads_every_chunk_once(table: ChunkTable) -> None:
    one_epoch = samples(table, keep_rest=True)
    chunks = np.concatenate([one_epoch.chunks(number) for number in range(len(one_epoch))])
    assert sorted(chunks[chunks >= 0]) == list(range(table.num_chunks))
    assert len(samples(table)) == table.num_chunks // CHUNKS


def test_chunks_of_a_document_stay_together_in_order(table: ChunkTable) -> None:
    stream = Stream(table, np.array([3, 0, 5]))
    first = table.first_chunk
    expected = [*range(first[3], first[4]), *range(first[0], first[1]), *range(first[5], first[6])]
    assert stream.chunks(np.arange(len(stream) + 2)).tolist() == [*expected, -1, -1]


def test_order_depends_on_seed_and_epoch_alone(table: ChunkTable) -> None:
    def order(seed: int, num_samples: int) -> list[list[int]]:
        some = samples(table, seed=seed, num_samples=num_samples)
        return [some.chunks(number).tolist() for number in range(num_samples)]

    epoch = samples(table).epoch_size
    long = order(1, 3 * epoch)
    assert order(1, epoch) == long[:epoch]
    assert order(2, epoch) != long[:epoch]
    assert long[:epoch] != long[epoch : 2 * epoch]
    some = samples(table, seed=1, num_samples=3 * epoch)
    assert [some.chunks(number).tolist() for number in reversed(range(3 * epoch))] == long[::-1]


def test_every_token_but_a_documents_first_is_predicted_once(table: ChunkTable) -> None:
    every = samples(table, keep_rest=True)
    batch = every.batch(np.arange(len(every)))
    predicted = batch.labels_BxS[batch.loss_mask_BxS > 0]
    firsts = set(table.corpora[0].start[table.corpora[0].length > 0].tolist())
    assert sorted(predicted.tolist()) == sorted(set(range(table.num_tokens)) - firsts)
    # a label is what follows its token in the text
    assert torch.equal(batch.labels_BxS[batch.loss_mask_BxS > 0], batch.tokens_BxS[batch.loss_mask_BxS > 0] + 1)


def test_order_puts_text_before_padding_and_leaves_it_in_order(table: ChunkTable) -> None:
    every = samples(table, keep_rest=True)
    batch = every.batch(np.arange(len(every)))
    padding = batch.tokens_BxS == PAD
    assert padding.any() and batch.order_BxS is not None
    for order, is_padding in zip(batch.order_BxS.tolist(), padding.tolist(), strict=True):
        text = [position for position, empty in enumerate(is_padding) if not empty]
        assert order[: len(text)] == text and sorted(order) == list(range(len(order)))
    full = ChunkTable([corpus("full", [4 * CHUNK])], CHUNK)
    assert samples(full).batch(np.array([0])).order_BxS is None


def test_chunks_that_read_by_hand() -> None:
    ids_BxLxK = np.array([[[-1, -1], [3, -1], [-1, 4]], [[5, 6], [-1, -1], [-1, -1]]])
    found = chunks_that_read(ids_BxLxK)
    assert found is not None and found.tolist() == [1, 2, 3]
    assert chunks_that_read(ids_BxLxK[:1, 1:]) is None  # all of them
    nothing = chunks_that_read(np.full((2, 3, 2), -1))
    assert nothing is not None and nothing.tolist() == [0]  # so that there is something to compute


def test_neighbors_come_from_no_document_of_the_sample(table: ChunkTable) -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(0, table.num_chunks, size=(table.num_chunks, 6))
    some = samples(table, neighbors=Fixed(ids), num_neighbors=2)
    for number in range(len(some)):
        chunks = some.chunks(number)
        chosen = some._foreign(chunks)
        own = set(table.document(chunks).tolist())
        for row, chunk in enumerate(chunks):
            allowed = [id for id in ids[chunk] if int(table.document(np.array(id))) not in own]
            expected = [] if table.is_last(np.array([chunk]))[0] else list(dict.fromkeys(allowed))[:2]
            assert [id for id in chosen[row] if id >= 0] == expected


def test_neighbor_text_is_chunk_and_continuation_of_its_document(table: ChunkTable) -> None:
    first = int(table.first_chunk[3])  # 22 tokens: 5, 5, 5, 5, 2
    ids = np.full((table.num_chunks, 2), -1)
    long = table.first_chunk[6]
    ids[long] = [first + 3, first + 4]
    some = samples(table, neighbors=Fixed(ids), chunks_a_sample=1)
    number = next(number for number in range(len(some)) if some.chunks(number)[0] == long)
    batch = some.batch(np.array([number]))
    assert batch.neighbor_tokens_BxLxKxR is not None and batch.neighbor_lengths_BxLxK is not None
    begin = int(table.corpora[0].start[3])
    assert batch.neighbor_lengths_BxLxK[0, 0].tolist() == [7, 2]
    assert batch.neighbor_tokens_BxLxKxR[0, 0, 0].tolist() == [*range(begin + 15, begin + 22), PAD, PAD, PAD]
    assert batch.neighbor_tokens_BxLxKxR[0, 0, 1].tolist() == [begin + 20, begin + 21, *[PAD] * 8]


def test_neighbors_that_repeat_one_another_or_copy_their_chunk_are_passed_over() -> None:
    """Chunks of 5 tokens: 0 asks; 2 shares a run of 3 with it, 4 and 6 have the same text, 8 shares nothing."""
    text = [1, 2, 3, 4, 5, 99, 99, 99, 99, 99]
    text += [9, 2, 3, 4, 8, 60, 61, 62, 63, 64]
    text += [30, 31, 32, 33, 34, 70, 71, 72, 73, 74, 30, 31, 32, 33, 34, 80, 81, 82, 83, 84]
    text += [40, 41, 42, 43, 44, 90, 91, 92, 93, 94]
    tokens = np.array(text, np.uint16)
    some = Corpus("some", tokens, np.arange(0, 50, 10), np.full(5, 10), 0.0)
    ids = np.tile([2, 4, 6, 8], (10, 1))
    for max_overlap, expected in ((1.0, [2, 4, 8]), (0.6, [2, 4, 8]), (0.59, [4, 8, -1]), (0.0, [4, 8, -1])):
        one = samples(
            ChunkTable([some], CHUNK), neighbors=Fixed(ids), num_neighbors=3, chunks_a_sample=2, max_overlap=max_overlap
        )
        assert one._foreign(np.array([0, 1]))[0].tolist() == expected


def test_retrieval_modes_and_dropout() -> None:
    many = ChunkTable([corpus("a", [4 * CHUNK] * 50)], CHUNK)
    far = (np.arange(many.num_chunks)[:, None] + np.array([40, 60, 80])) % many.num_chunks
    numbers = np.arange(50)

    def lengths(retrieval: str = "on", **changes: object) -> torch.Tensor | None:
        return (
            samples(many, neighbors=Fixed(far), num_samples=50, **changes)
            .batch(numbers, retrieval)
            .neighbor_lengths_BxLxK
        )

    def tokens(retrieval: str = "on", **changes: object) -> torch.Tensor:
        batch = samples(many, neighbors=Fixed(far), num_samples=50, **changes).batch(numbers, retrieval)
        assert batch.neighbor_tokens_BxLxKxR is not None
        return batch.neighbor_tokens_BxLxKxR

    assert lengths("off") is None
    on = lengths()
    assert on is not None and (on > 0).any((1, 2)).all()
    hidden = lengths(retrieval_dropout=0.5)
    assert hidden is not None
    shown = (hidden > 0).any((1, 2))
    assert 10 <= int(shown.sum()) <= 40
    assert torch.equal(hidden[shown], on[shown])
    swapped = (tokens(random_neighbor_prob=0.5) != tokens()).flatten(1).any(1)
    assert 10 <= int(swapped.sum()) <= 40
    assert (tokens("random") != tokens()).flatten(1).any(1).all()
    assert torch.equal(tokens("random"), tokens("random"))
    none = lengths(retrieval_dropout=1.0)
    assert none is not None and not none.any()


def test_empty_samples_fill_up_a_batch(table: ChunkTable) -> None:
    batch = samples(table).batch(np.array([0, -1]))
    assert batch.loss_mask_BxS[0].any() and not batch.loss_mask_BxS[1].any()


def test_corpora_are_interleaved_by_weight_and_prefixes_never_change() -> None:
    sequence, element = interleave([3.0, 1.0], 400)
    assert np.bincount(sequence).tolist() == [300, 100]
    for number in range(2):
        assert element[sequence == number].tolist() == list(range((sequence == number).sum()))
    shorter, _ = interleave([3.0, 1.0], 123)
    assert np.array_equal(shorter, sequence[:123])


def test_weights_choose_corpora() -> None:
    two = ChunkTable([corpus("a", [30] * 9), corpus("b", [30] * 3, first_token=5000)], CHUNK)
    only_b = samples(two, corpus_weights={"b": 0.0})
    assert (only_b.batch(np.arange(len(only_b))).tokens_BxS >= 5000).all()
    even = samples(two, corpus_weights={"a": 1.0, "b": 1.0}, num_samples=60)
    from_b = sum(int(even.batch(np.array([number])).tokens_BxS[0, 0] >= 5000) for number in range(60))
    assert from_b == 30
    by_size = samples(two)
    assert len(by_size) == sum(len(c.length) * 6 // CHUNKS for c in two.corpora)


def test_a_split_without_a_sample_is_refused(table: ChunkTable) -> None:
    with pytest.raises(UserError, match=r"valid split holds less than one sample.*--split.*--seq-length"):
        samples(table, split="valid")
