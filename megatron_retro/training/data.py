"""From a work dir to training and evaluation samples, every mismatch refused."""

import dataclasses
import pathlib
from typing import Any, Protocol

import numpy as np

from megatron_retro import distributed
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.training import DataConfig
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.samples import Batch, NeighborSource, Samples
from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.errors import UserError
from megatron_retro.workdir import STAGES, WorkDir


class TrainingSamples(Protocol):
    """What a run trains or is evaluated on: `Samples`, or `InstructionSamples`.

    Attributes:
        table: the work dir's chunks.
        epoch_size: samples of one pass.
    """

    table: ChunkTable
    epoch_size: int

    def __len__(self) -> int: ...

    def batch(self, sample_ids: np.ndarray, retrieval: str = "on") -> Batch: ...

    def described(self, sample_ids: np.ndarray) -> list[dict[str, Any]]:
        """What samples are made of, in plain values."""


@dataclasses.dataclass
class TrainingData:
    """An opened, verified work dir.

    Attributes:
        neighbors: None where the model does not retrieve.
        vocab_size: the tokenizer's, not padded.
        tokenizer_digest: of the tokenizer.
        digest: of tokenizer, corpus and chunks.
    """

    table: ChunkTable
    neighbors: NeighborSource | None
    split_weights: tuple[float, ...]
    vocab_size: int
    pad: int
    tokenizer_path: pathlib.Path
    tokenizer_digest: str
    digest: str

    @classmethod
    def open(cls, work_dir: str, *, retrieve: bool, verify: str = "quick") -> "TrainingData":
        """Verify and open; every rank calls it. A GPT needs no index or neighbors.

        Args:
            verify: "full" reads every byte.

        Raises:
            UserError: a stage is missing, or something was exchanged since it was built.
        """
        work = distributed.together(lambda: open_work_dir(work_dir))
        work.full = verify == "full"
        work.verify(STAGES if retrieve else STAGES[: STAGES.index("chunks") + 1])
        return distributed.together(lambda: cls._of(work, retrieve))

    @classmethod
    def _of(cls, work: WorkDir, retrieve: bool) -> "TrainingData":
        table, neighbors = ChunkTable.open(work), None
        if retrieve:
            from megatron_retro.retrieval.neighbors import NeighborTable

            neighbors = NeighborTable(work, table)
            neighbors.open_all()
        return cls(
            table,
            neighbors,
            split_weights(work),
            work.facts("tokenizer")["vocab_size"],
            work.facts("tokenizer")["pad"],
            work.path / work.facts("tokenizer")["file"],
            work.manifest["stages"]["tokenizer"]["digest"],
            work.manifest["stages"]["chunks"]["digest"],
        )

    def samples(
        self,
        split: str,
        data: DataConfig,
        retro: RetroConfig | None,
        *,
        seq_length: int,
        num_samples: int | None,
        training: bool,
    ) -> Samples:
        """Samples of a split. Training weights corpora and hides neighbors; evaluation reads each sample once.

        Raises:
            UserError: --seq-length is no multiple of the chunk length, --data-path names no corpus, the work dir has
                fewer neighbors than asked for, or the split is too small.
        """
        chunk_length = self.table.chunk_length
        check_seq_length(seq_length, chunk_length)
        weights = corpus_weights(self.table, data.data_path)
        if retro and self.neighbors:
            check_num_neighbors(retro.retro_num_neighbors, self.neighbors.num_neighbors)
        return Samples(
            self.table,
            split=split,
            split_weights=self.split_weights,
            corpus_weights=weights if training or weights is None else dict.fromkeys(weights, 0.0),  # each sample once
            chunks_a_sample=seq_length // chunk_length,
            seed=data.seed if training else 0,
            pad=self.pad,
            num_samples=num_samples,
            keep_rest=not training,
            neighbors=self.neighbors,
            num_neighbors=retro.retro_num_neighbors if retro else 0,
            retrieval_dropout=retro.retro_retrieval_dropout if retro and training else 0.0,
            random_neighbor_prob=retro.retro_random_neighbor_prob if retro and training else 0.0,
            max_overlap=retro.retro_max_overlap if retro and training else 1.0,
        )

    def open_tokenizer(self) -> Tokenizer:
        return Tokenizer.open(self.tokenizer_path)

    def num_chunks(self, split: str) -> int:
        """Chunks in a split, over all corpora."""
        return len(self.table.chunks_of(self.table.documents_in(split, self.split_weights)))


def open_work_dir(path: str) -> WorkDir:
    """The manifest of a work dir that there is.

    Raises:
        UserError: there is none.
    """
    if not (pathlib.Path(path) / "manifest.json").exists():
        raise UserError(
            f"--retro-work-dir {path} holds no manifest.json; tools/preprocess_retro_data.py builds a work dir"
        )
    return WorkDir(path)


def split_weights(work: WorkDir) -> tuple[float, ...]:
    """The shares of train, valid and test that a work dir was built with."""
    return tuple(float(share) for share in str(work.settings["split"]).split(","))


def check_split(asked: str | None, work_dir_split: tuple[float, ...]) -> None:
    """`--split` may be passed to training, but the work dir has decided."""
    if asked is not None and tuple(float(share) for share in asked.split(",")) != work_dir_split:
        built = ",".join(f"{share:g}" for share in work_dir_split)
        raise UserError(f"--split {asked} differs from the work dir's {built}; leave it out, or build a new work dir")


def check_seq_length(seq_length: int, chunk_length: int) -> None:
    """Refuse samples that are no whole number of chunks."""
    if seq_length % chunk_length:
        raise UserError(f"--seq-length {seq_length} is no multiple of the work dir's chunk length {chunk_length}")


def check_num_neighbors(asked: int, saved: int) -> None:
    """Refuse a K above what the work dir holds.

    Raises:
        UserError: names both.
    """
    if asked > saved:
        raise UserError(
            f"--retro-num-neighbors {asked} is more than the {saved} that the work dir holds for each chunk; "
            "build one with a larger --retro-query-num-neighbors-save"
        )


def corpus_weights(table: ChunkTable, data_path: tuple[str, ...]) -> dict[str, float] | None:
    """`--data-path [WEIGHT] NAME …` as name -> weight; None for all corpora by size, when nothing is given.

    A name is a corpus's name in the work dir, or a path whose last part is one.

    Raises:
        UserError: a name is no corpus of the work dir, or stands twice.
    """
    chosen = {}
    weights = iter(data_path)
    for item in weights:
        weight = _number(item)
        name = pathlib.PurePath(item if weight is None else next(weights, "")).name
        known = [corpus.name for corpus in table.corpora]
        if name not in known:
            raise UserError(f"--data-path: the work dir has no corpus {name!r}; it has {', '.join(known)}")
        if name in chosen:
            raise UserError(f"--data-path names the corpus {name!r} twice")
        if weight is not None and weight <= 0:
            raise UserError(f"--data-path: the weight of {name!r} is {weight}; it must be above 0")
        chosen[name] = weight or 0.0
    if chosen and 0 < sum(weight == 0 for weight in chosen.values()) < len(chosen):
        raise UserError("--data-path gives a weight to some corpora only; give it to all or to none")
    stored = {corpus.name: corpus.weight for corpus in table.corpora}
    if not chosen and all(stored.values()):
        return stored
    return chosen or None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
