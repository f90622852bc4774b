"""From files of conversations to samples of instruction tuning.

Each rank encodes a share of a file, and asks the work dir for a share of what brings no texts of its own. What is found
is kept in the work dir (or under --save where that cannot be written to), so that a run that goes on, and the next run
on the same file, need not ask:

    sft/<digest of queries and work dir>/<a>-<b>.npy   ids of the best chunks for queries a … b-1, [b-a, K_saved] int64
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import numpy as np
import xxhash

from megatron_retro import distributed, storage
from megatron_retro.config.training import PretrainConfig
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.instructions import Examples, ExampleSource, InstructionSamples, packed
from megatron_retro.data.questions import filler, read_conversations
from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.errors import UserError
from megatron_retro.reading import load_array
from megatron_retro.retrieval.live import LiveRetriever, without_repeats
from megatron_retro.retrieval.progress import Progress
from megatron_retro.training.data import TrainingData, check_num_neighbors, check_seq_length, open_work_dir
from megatron_retro.workdir import STAGES, WorkDir

_ENCODED_AT_ONCE, _BLOCK = 500, 128  # examples, queries


@dataclasses.dataclass
class InstructionData:
    """The files of a run.

    Attributes:
        digest: of what is trained on.
        lines: that tell people what the files hold.
    """

    data: TrainingData
    train: list[ExampleSource]
    valid: list[ExampleSource]
    digest: str
    lines: list[str]

    @classmethod
    def open(cls, config: PretrainConfig, data: TrainingData) -> "InstructionData":
        """Read, encode and retrieve; every rank calls it.

        Raises:
            UserError: a file or line is wrong, nothing of a file fits, or the work dir has no index to ask.
        """
        given, seq_length = config.instructions, config.model.seq_length
        check_seq_length(seq_length, data.table.chunk_length)
        tokenizer, search = distributed.together(data.open_tokenizer), _Search(config, data.table)
        files, lines = {}, []
        for flag, items in (("--sft-data", given.sft_data), ("--sft-valid-data", given.sft_valid_data)):
            sources = []
            for weight, path in distributed.together(functools.partial(weighted, flag, items)):
                examples = _encoded(config, data, tokenizer, flag, path)
                neighbors = search.neighbors(examples, path.name)
                num_chunks = examples.num_chunks(data.table.chunk_length)
                members = packed(num_chunks, seq_length // data.table.chunk_length)
                weight = weight if flag == "--sft-data" else 0.0  # evaluation reads each sample once
                sources.append(ExampleSource(path, examples, weight, neighbors, members))
                lines.append(_described(flag, sources[-1], seq_length))
            files[flag] = sources
        prints = distributed.together(
            lambda: [[source.weight, storage.fingerprint(source.path)] for source in files["--sft-data"]]
        )
        digest = storage.digest_of([data.digest, prints, given.qa_prompt])
        return cls(data, files["--sft-data"], files["--sft-valid-data"], digest, lines)

    def samples(self, config: PretrainConfig, split: str, num_samples: int | None) -> InstructionSamples:
        """Samples of "train" or "valid"; the latter are each read once, and all that they have to read."""
        training, retro = split == "train", config.active_retro
        return InstructionSamples(
            self.data.table,
            self.train if training else self.valid,
            database=self.data.table.database_documents(self.data.split_weights),
            chunks_a_sample=config.model.seq_length // self.data.table.chunk_length,
            seed=config.data.seed if training else 0,
            pad=self.data.pad,
            num_samples=num_samples,
            num_neighbors=retro.retro_num_neighbors if retro else 0,
            retrieval_dropout=retro.retro_retrieval_dropout if retro and training else 0.0,
            random_neighbor_prob=retro.retro_random_neighbor_prob if retro and training else 0.0,
        )


def weighted(flag: str, items: tuple[str, ...]) -> list[tuple[float, pathlib.Path]]:
    """`[WEIGHT] FILE …` as pairs, 0 where no weight is given.

    Raises:
        UserError: a weight has no file, is not above 0, or is given to some files only; or there is no such file.
    """
    pairs, rest = [], iter(items)
    for item in rest:
        weight, file = 0.0, item
        if not pathlib.Path(item).is_file():
            try:
                weight, file = float(item), next(rest, "")
            except ValueError:
                raise UserError(f"{flag} {item}: {_no_file(item)}") from None
            if not 0 < weight < float("inf"):
                raise UserError(f"{flag}: the weight {item} of {file or 'no file'} must be above 0")
            if not pathlib.Path(file).is_file():
                raise UserError(f"{flag} {item} {file}: {_no_file(file)}")
        pairs.append((weight, pathlib.Path(file)))
    if 0 < sum(weight == 0 for weight, _ in pairs) < len(pairs):
        raise UserError(f"{flag} gives a weight to some files only; give it to all or to none")
    return pairs


def _no_file(path: str) -> str:
    if pathlib.Path(path).is_dir():
        return "is a directory; name its files of JSON lines one by one"
    return "no such file; give JSON lines"


def _encoded(
    config: PretrainConfig, data: TrainingData, tokenizer: Tokenizer, flag: str, path: pathlib.Path
) -> Examples:
    """A file's examples: each rank encodes a share, and gets all."""
    seq_length, retro = config.model.seq_length, config.active_retro
    template = config.instructions.qa_prompt
    conversations = distributed.together(lambda: read_conversations(flag, path, template))
    bounds = [len(conversations) * rank // distributed.world_size() for rank in range(distributed.world_size() + 1)]
    share = conversations[bounds[distributed.rank()] : bounds[distributed.rank() + 1]]
    encode = functools.partial(
        Examples.of,
        tokenizer=tokenizer,
        chunk_length=data.table.chunk_length,
        max_tokens=seq_length,
        fill=filler(tokenizer),
        num_neighbors=retro.retro_num_neighbors if retro else 0,
    )

    def parts() -> Iterator[Examples]:
        with Progress(f"encode {path.name}", len(share), "examples") as progress:
            for begin in range(0, max(1, len(share)), _ENCODED_AT_ONCE):
                some = share[begin : begin + _ENCODED_AT_ONCE]
                yield encode(some)
                progress.advance(len(some))

    mine = distributed.together(lambda: Examples.joined(list(parts())))
    examples = Examples.joined(distributed.all_gather(mine))
    if not len(examples):
        raise UserError(
            f"{flag} {path}: no example fits --seq-length {seq_length} with a token of its answer; take a larger one"
        )
    return examples


def _described(flag: str, source: ExampleSource, seq_length: int) -> str:
    examples, num_samples = source.examples, len(source.samples)
    counts, with_texts = examples.counts, int((examples.num_contexts > 0).sum())
    tokens, predicted = len(examples.tokens.values), int(examples.is_answer.values.sum())
    told = [
        f"{len(examples):,} examples, {with_texts:,} of them with ctxs",
        f"{tokens:,} tokens, {predicted / tokens:.1%} of them answers'",
        f"packed into {num_samples:,} samples, {1 - tokens / (num_samples * seq_length):.1%} of them padding",
    ]
    if counts.get("cut"):
        told.append(f"{counts['cut']:,} cut at --seq-length {seq_length}")
    if counts.get("skipped"):
        told.append(f"{counts['skipped']:,} left out: their prompt alone fills --seq-length {seq_length}")
    if counts.get("cut contexts"):
        told.append(f"{counts['cut contexts']:,} texts of ctxs cut at two chunks")
    if counts.get("left out"):
        told.append(f"{counts['left out']:,} texts of ctxs beyond --retro-num-neighbors left out")
    return f"{flag} {source.path}: {'; '.join(told)}"


# ------------------------------------------------------------------------------------------------ retrieval


class _Search:
    """Asks the work dir; its index is opened when there is something to ask."""

    def __init__(self, config: PretrainConfig, table: ChunkTable):
        self._config, self._table = config, table

    @functools.cached_property
    def _work(self) -> WorkDir:
        """Verified, by all ranks."""
        work = distributed.together(lambda: open_work_dir(str(self._config.retro.retro_work_dir)))
        work.full = self._config.data.verify_data == "full"
        work.verify(STAGES)
        check_num_neighbors(self._config.retro.retro_num_neighbors, self._num_saved(work))
        return work

    @functools.cached_property
    def _retriever(self) -> LiveRetriever:
        return LiveRetriever(self._work)

    def _num_saved(self, work: WorkDir) -> int:
        return work.facts("neighbors")["num_neighbors"]

    def neighbors(self, examples: Examples, name: str) -> np.ndarray:
        """The best chunks for the queries of a file's examples, ids [queries, K_saved] int64; every rank calls it."""
        queries = examples.queries(self._table.chunk_length)
        if self._config.active_retro is None or not len(queries):
            return np.full((len(queries), 1), -1)
        work, k = self._work, self._num_saved(self._work)
        contents = xxhash.xxh3_128(queries.tobytes()).hexdigest()
        digest = storage.digest_of([contents, work.manifest["stages"]["neighbors"]["digest"]])
        folder = distributed.all_gather(distributed.together(self._folder))[0] / digest
        bounds = [(begin, min(begin + _BLOCK, len(queries))) for begin in range(0, len(queries), _BLOCK)]
        files = {folder / f"{begin}-{end}.npy": queries[begin:end] for begin, end in bounds}
        self._make(files, k, folder, f"retrieve for {name}")
        return distributed.together(lambda: _loaded(files, k, self._table.num_chunks))

    def _make(self, files: dict[pathlib.Path, np.ndarray], k: int, folder: pathlib.Path, stage: str) -> None:
        """Make those of the files that are missing: each rank one at a time, so that none waits long for another."""
        missing = distributed.all_gather([path for path in files if not path.exists()])[0]
        if not missing:
            return
        held = distributed.together(lambda: storage.lock("--sft-data", folder) if not distributed.rank() else None)
        done = sum(len(rows) for path, rows in files.items() if path.exists())

        def make(path: pathlib.Path | None) -> None:
            if path:
                storage.save_npy(path, self._ask(files[path], k))

        with Progress(stage, sum(map(len, files.values())), "chunks", done, together=True) as progress:
            for begin in range(0, len(missing), distributed.world_size()):
                some = missing[begin : begin + distributed.world_size()]
                mine = some[distributed.rank()] if distributed.rank() < len(some) else None
                distributed.together(functools.partial(make, mine))
                progress.advance(sum(len(files[path]) for path in some))
        if held:
            held.close()

    def _ask(self, queries: np.ndarray, k: int) -> np.ndarray:
        """[n, C] tokens -> [n, k] ids, as generation finds them."""
        texts = self._retriever.tokenizer.decode(queries.tolist())
        ids, _ = without_repeats(self._table, *self._retriever.search(texts, k), k)
        return ids

    def _folder(self) -> pathlib.Path:
        """Where what was found is kept."""
        work, save = self._work.path, self._config.run.save
        try:
            storage.check_writable("--retro-work-dir", work)
        except UserError:
            if not save:
                raise
            return pathlib.Path(save) / "sft"
        return work / "sft"


def _loaded(files: dict[pathlib.Path, np.ndarray], k: int, num_chunks: int) -> np.ndarray:
    blocks = []
    for path, queries in files.items():
        way_out = "remove it: it will be made again"
        ids = np.array(load_array(path, np.int64, (len(queries), k), way_out=way_out))
        if ids.min() < -1 or ids.max() >= num_chunks:
            raise UserError(f"{path} holds ids {ids.min()} … {ids.max()} of {num_chunks} chunks; {way_out}")
        blocks.append(ids)
    return np.concatenate(blocks)
