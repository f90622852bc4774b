"""Where the windows of a Megatron project lie: its samples in the order of its training, cut into windows of C tokens.

Megatron lays a split's sequences end to end in a shuffled order, epoch after epoch, cuts that stream into samples, and
shuffles these; the samples of several corpora are interleaved by weight. A window may begin and end anywhere.
"""

import dataclasses
import itertools
import math

import numpy as np

from megatron_retro import mcore
from megatron_retro.data.chunks import SPLITS, running_sum
from megatron_retro.errors import UserError

_SURPLUS = 0.005  # samples that Megatron draws from each corpus of a blend beyond its share
_OWN_SHUFFLE = 0.8  # a last epoch of fewer than this share of its samples is shuffled by itself


@dataclasses.dataclass(frozen=True)
class _Stream:
    """A corpus's share of a split: sequences [n] int64, first token of each [n + 1], and the order of the samples."""

    sequences: np.ndarray
    begin: np.ndarray
    shuffle: np.ndarray


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where windows lie, arrays [n] int64.

    Attributes:
        corpus: of the window's sample.
        sequence, offset: where it begins.
        last_sequence: where it ends.
        across: bool, whether it goes beyond the sequence it begins in, maybe to the same one of the next epoch.
    """

    corpus: np.ndarray
    sequence: np.ndarray
    offset: np.ndarray
    last_sequence: np.ndarray
    across: np.ndarray


class Order:
    """The windows of one split.

    Args:
        lengths: tokens of each sequence of each corpus.
        weights: of the corpora in the blend.
        shares: of train, valid and test.
        split: one of them.
        samples: that were queried.
        seq_length, chunk_length: S and C.
        seed: of the shuffles.

    Raises:
        UserError: a corpus has no tokens in the split.
    """

    def __init__(
        self,
        lengths: list[np.ndarray],
        weights: list[float],
        shares: tuple[float, ...],
        split: str,
        *,
        samples: int,
        seq_length: int,
        chunk_length: int,
        seed: int,
    ):
        self._seq_length, self._chunk_length = seq_length, chunk_length
        bounds = (np.cumsum([0.0, *shares]) / sum(shares))[SPLITS.index(split) :][:2]
        share = np.array(weights) / sum(weights)
        drawn = [math.ceil(samples * weight) for weight in share]
        self._streams = []
        for number, (of_corpus, count) in enumerate(zip(lengths, drawn, strict=True)):
            first, behind = (round(bound * len(of_corpus)) for bound in bounds)
            if not of_corpus[first:behind].sum():
                raise UserError(
                    f"--retro-project-dir: the {split} split of its corpus {number + 1} has no tokens; give the "
                    "corpora that it was made from"
                )
            self._streams.append(_stream(of_corpus, first, behind, math.ceil(count * (1 + _SURPLUS)), seq_length, seed))
        self._corpus, self._sample = mcore.blend(share, sum(drawn))

    def windows(self, first: int, end: int) -> Windows:
        """The windows `first` … `end`-1."""
        sample, place = np.divmod(np.arange(first, end), self._seq_length // self._chunk_length)
        corpus = self._corpus[sample].astype(np.int64)
        found = [np.empty(end - first, np.int64) for _ in range(4)]
        for number, stream in enumerate(self._streams):
            rows = np.flatnonzero(corpus == number)
            shuffled = stream.shuffle[self._sample[sample[rows]]].astype(np.int64)
            begin = shuffled * self._seq_length + place[rows] * self._chunk_length
            at = np.searchsorted(stream.begin, begin, side="right") - 1
            last = np.searchsorted(stream.begin, begin + self._chunk_length - 1, side="right") - 1
            here = (stream.sequences[at], begin - stream.begin[at], stream.sequences[last], at != last)
            for array, values in zip(found, here, strict=True):
                array[rows] = values
        sequence, offset, last_sequence, across = found
        return Windows(corpus, sequence, offset, last_sequence, across.astype(bool))


def _stream(lengths: np.ndarray, first: int, behind: int, samples: int, seq_length: int, seed: int) -> _Stream:
    """The stream that gives `samples` samples of `seq_length` tokens, and of one token more for the last label."""
    tokens = int(lengths[first:behind].sum())
    epochs = max(1, -(-(samples * seq_length + 1) // tokens))
    before_last = ((epochs - 1) * tokens - 1) // seq_length
    of_last, of_epoch = samples - before_last, (tokens - 1) // seq_length
    own_shuffle = epochs > 1 and of_last < int(_OWN_SHUFFLE * of_epoch)
    random = np.random.RandomState(seed)
    sequences = np.arange(first, behind, dtype=np.int32)
    parts = [epochs - 1, 1] if own_shuffle else [epochs]
    order = [np.tile(sequences, part) for part in parts]
    for epochs_of_one in order:
        random.shuffle(epochs_of_one)
    laid = np.concatenate(order).astype(np.int64)
    whole = (epochs * tokens - 1) // seq_length
    cuts = [0, before_last, whole] if own_shuffle else [0, whole]
    shuffles = [np.arange(begin, end, dtype=np.int64) for begin, end in itertools.pairwise(cuts)]
    for samples_of_one in shuffles:
        random.shuffle(samples_of_one)
    return _Stream(laid, running_sum(lengths[laid]), np.concatenate(shuffles))
