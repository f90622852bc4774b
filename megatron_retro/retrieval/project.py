"""A RETRO project directory of Megatron-LM (up to 0.15), read only.

    config.json                     blend, tokenizer, chunk and sequence length, names of the directories below query/
    data/<prefix>.bin .idx          its corpora
    db/indexed_dataset_infos.json   documents and chunks of each corpus
    db/merged/train.hdf5            `chunks` [n, 5] uint32: corpus, sequence, first token, token behind, BERT tokens
    index/<type>/<factory>/added_*.faissindex   vectors under the rows of `chunks`
    query/<split>_<hash>/<a>-<b>.hdf5   `neighbors` [b-a, K] int64 of windows a … b-1: rows of `chunks`; -1: none

A window is C tokens of a sample; windows are counted through the samples in the order of training (`project_order`).
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_retro.config.preprocessing import PreprocessConfig
from megatron_retro.data.chunks import SPLITS, sequences
from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json, read_text
from megatron_retro.retrieval.corpora import weighted_prefixes
from megatron_retro.retrieval.index import read_index

_FLAG = "--retro-project-dir"
_ROWS = 1 << 20


@dataclasses.dataclass(frozen=True)
class NeighborBlock:
    """Neighbors of the windows `begin` … `end`-1."""

    path: pathlib.Path
    begin: int
    end: int


class Project:
    """What a project's `config.json` and directories say.

    Attributes:
        blend: (weight, prefix below `data/`) of each corpus.
        split: shares of train, valid and test, of each corpus's sequences in their order.
        chunk_length: C, tokens of a chunk and of a window.
        seq_length, seed: of the samples whose windows were queried.
        samples: split -> samples queried.

    Raises:
        UserError: it is none.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        file = path / "config.json"
        if not file.is_file():
            raise UserError(
                f"{_FLAG} {path}: no file config.json; give the directory that Megatron's project has it in"
            )
        try:
            values = parse_json(read_text(f"{_FLAG}: {file}", file))
            data_path = values["retro_gpt_data_path"]
            data_path = data_path.split() if isinstance(data_path, str) else [str(word) for word in data_path]
            data_path = ["1", *data_path] if len(data_path) == 1 else data_path
            self.blend = [(float(weight), prefix) for weight, prefix in zip(*[iter(data_path)] * 2, strict=True)]
            shares = [float(share) for share in values["retro_gpt_split"].split(",")]
            self.split = (*shares, 0.0, 0.0)[:3]
            self.chunk_length = int(values["retro_gpt_chunk_length"])
            self.seq_length, self.seed = int(values["retro_gpt_seq_length"]), int(values["retro_gpt_seed"])
            self.samples = _samples(values)
            self._directories = {split: (values["retro_neighbor_dirs"] or {}).get(split) for split in SPLITS}
            self._tokenizer = {name: values.get(f"retro_gpt_{name}") for name in _TOKENIZER_FILES}
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{_FLAG}: {file} is no RETRO project's ({reason}); give a project of Megatron-LM"
            ) from None
        if not self.blend or min(*self.split[:1], self.chunk_length, self.seq_length) <= 0:
            raise UserError(f"{_FLAG}: {file} names no corpus, or lengths below 1; give a project of Megatron-LM")

    def prefixes(self) -> list[pathlib.Path]:
        """Where the corpora lie."""
        return [self.path / "data" / prefix for _, prefix in self.blend]

    def tokenizer(self) -> dict[str, str]:
        """The tokenizer's files by the name of their flag."""
        return {name: str(self.path / file) for name, file in self._tokenizer.items() if file}

    # -------------------------------------------------------------------------------------------- db

    def num_documents(self) -> list[int]:
        """Documents of each corpus when the project was made."""
        file = self.path / "db" / "indexed_dataset_infos.json"
        try:
            return [int(entry["n_docs"]) for entry in parse_json(read_text(f"{_FLAG}: {file}", file))]
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{_FLAG}: {file} is no list of corpora ({error}); restore it") from None

    def chunks(self) -> Iterator[np.ndarray]:
        """The database, some rows at a time: [n, 4] int64 corpus, sequence, first token, token behind."""
        with self._open(self.path / "db" / "merged" / "train.hdf5", "chunks", (None, 5)) as chunks:
            for begin in range(0, len(chunks), _ROWS):
                yield chunks[begin : begin + _ROWS, :4].astype(np.int64)

    # -------------------------------------------------------------------------------------------- query

    def blocks(self, split: str) -> list[NeighborBlock]:
        """The files of a split's neighbors, in order; none where it was not queried.

        Raises:
            UserError: one is missing, or there are more or fewer windows than `config.json` tells.
        """
        name = self._directories[split]
        if not name:
            return []
        directory = self.path / "query" / name
        files = sorted(directory.glob("*.hdf5"))
        blocks = [NeighborBlock(file, *_range(file)) for file in files]
        blocks.sort(key=lambda block: block.begin)
        wanted, at = self.samples[split] * self.seq_length // self.chunk_length, 0
        for block in blocks:
            if block.begin != at or block.end <= at:
                break
            at = block.end
        if at != wanted or not blocks or blocks[-1].end != at:
            raise UserError(
                f"{_FLAG}: {directory} holds the neighbors of windows 0 … {at - 1} without a gap, config.json tells of "
                f"{wanted} windows; finish its query, or take the directory out of retro_neighbor_dirs"
            )
        return blocks

    def neighbors(self, block: NeighborBlock) -> np.ndarray:
        """[end - begin, K] int64 rows of `chunks`, -1 for none."""
        with self._open(block.path, "neighbors", (block.end - block.begin, None)) as neighbors:
            return neighbors[:].astype(np.int64)

    # -------------------------------------------------------------------------------------------- index

    def index(self, factory: str | None) -> pathlib.Path | None:
        """The filled index (of a factory string, if given); None where there is none.

        Raises:
            UserError: there are several.
        """
        found = sorted((self.path / "index").glob("*/*/added_*.faissindex"))
        found = [file for file in found if factory in (None, "auto", file.parent.name)]
        if len(found) > 1:
            raise UserError(
                f"{_FLAG} {self.path} has {len(found)} indexes, {found[0]} and {found[1]} among them; "
                "give --retro-index-str the one to take, or move the others away"
            )
        return found[0] if found else None

    # -------------------------------------------------------------------------------------------- checks

    def check(self, factory: str | None) -> None:
        """Look at every file's type and shape, before hours of work.

        Args:
            factory: string of the index that is wanted, if one was given.

        Raises:
            UserError: names the file and what is wrong.
        """
        self.num_documents()
        if next(self.chunks(), None) is None:
            raise UserError(f"{_FLAG} {self.path}: its db/merged/train.hdf5 holds no chunk; finish its db-build")
        if index := self.index(factory):
            read_index(index, None, mapped=True)
        for split in SPLITS:
            for block in self.blocks(split):
                with self._open(block.path, "neighbors", (block.end - block.begin, None)):
                    pass

    @contextlib.contextmanager
    def _open(self, path: pathlib.Path, name: str, shape: tuple[int | None, ...]) -> Iterator[Any]:
        """A dataset of integers in an HDF5 file; None in `shape` stands for any length."""
        try:
            import h5py
        except ImportError:
            raise UserError(f"{_FLAG} needs the package h5py: pip install h5py") from None
        try:
            with h5py.File(path, "r") as file:
                if not isinstance(file.get(name, getlink=True), h5py.HardLink) or file[name].external:
                    raise ValueError(f"it holds no dataset {name!r}")
                dataset = file[name]
                fits = len(dataset.shape) == len(shape) and all(
                    wanted in (None, size) for wanted, size in zip(shape, dataset.shape, strict=True)
                )
                if dataset.dtype.kind not in "iu" or not fits:
                    expected = " x ".join("any" if wanted is None else str(wanted) for wanted in shape)
                    held = " x ".join(map(str, dataset.shape))
                    raise ValueError(f"its {name!r} is {dataset.dtype} {held}, not integers {expected}")
                yield dataset
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"{_FLAG}: {path} cannot be read ({reason}); restore it, or make it again") from None


_TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")


def _samples(values: dict[str, Any]) -> dict[str, int]:
    """Samples queried of each split: what Megatron trains and evaluates on in the whole run."""
    train, batch = int(values["retro_gpt_train_samples"]), int(values["retro_gpt_global_batch_size"])
    rounds, interval = int(values["retro_gpt_eval_iters"]), int(values["retro_gpt_eval_interval"])
    evaluations = train // batch // interval + 1
    return {"train": train, "valid": evaluations * rounds * batch, "test": rounds * batch}


def _range(file: pathlib.Path) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)-(\d+)", file.stem)
    if not found:
        raise UserError(f"{_FLAG}: {file} is not named <first>-<behind>.hdf5; move it away")
    return int(found[1]), int(found[2])


# ------------------------------------------------------------------------------------------------ flags


def with_project(config: PreprocessConfig) -> PreprocessConfig:
    """The configuration with what a project tells in the place of flags that were not given; checks the project.

    Raises:
        UserError: the project is damaged, or its corpora or its tokenizer are not where it tells.
    """
    if not config.documents.retro_project_dir:
        return config
    path = pathlib.Path(config.documents.retro_project_dir).absolute()
    project = Project(path)
    given = config.retrieval.retro_chunk_length
    if given not in (None, project.chunk_length):
        raise UserError(
            f"--retro-chunk-length is {given}, {_FLAG} {path} was made with {project.chunk_length}; leave the flag out"
        )
    documents = dataclasses.replace(config.documents, retro_project_dir=str(path))
    if not documents.data_path:
        blend = zip(project.blend, project.prefixes(), strict=True)
        words = [(f"{weight:g}", str(prefix)) for (weight, _), prefix in blend]
        documents = dataclasses.replace(documents, data_path=tuple(word for pair in words for word in pair))
    if documents.split is None:
        documents = dataclasses.replace(documents, split=",".join(f"{share:g}" for share in project.split))
    _check_corpora(project, documents.data_path)
    tokenizer = config.tokenizer
    if not config.tokenizer_paths():
        files = project.tokenizer()
        missing = [file for file in files.values() if not pathlib.Path(file).exists()]
        if missing or not files:
            raise UserError(
                f"{_FLAG} {path}: its tokenizer {missing[0] if missing else 'has no file'} is not there; give it as "
                "--tokenizer-model, or --vocab-file and --merge-file"
            )
        tokenizer = dataclasses.replace(tokenizer, **files)  # type: ignore[arg-type]
    project.check(config.retrieval.retro_index_str)
    retrieval = dataclasses.replace(config.retrieval, retro_chunk_length=project.chunk_length)
    return dataclasses.replace(config, documents=documents, tokenizer=tokenizer, retrieval=retrieval)


def _check_corpora(project: Project, data_path: tuple[str, ...]) -> None:
    prefixes = [prefix for _, prefix in weighted_prefixes(data_path)]
    named, counts = [prefix for _, prefix in project.blend], project.num_documents()
    if not len(prefixes) == len(named) == len(counts):
        raise UserError(
            f"--data-path names {len(prefixes)} corpora, {_FLAG} {project.path} was made from {len(named)}: "
            f"{', '.join(named)}; give these, in this order"
        )
    for prefix, name, count in zip(prefixes, named, counts, strict=True):
        if not pathlib.Path(f"{prefix}.idx").is_file():
            raise UserError(
                f"{_FLAG} {project.path}: its corpus {name} is not at {prefix}.bin .idx; give --data-path, "
                f"[WEIGHT] PREFIX of {', '.join(named)}, in this order"
            )
        found = len(sequences(prefix)[2]) - 1
        if found != count:
            raise UserError(
                f"--data-path {prefix} has {found} documents, {_FLAG} {project.path} was made from {count}; "
                "give the corpus that it was made from"
            )
