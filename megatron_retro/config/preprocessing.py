"""Flags of `tools/preprocess_retro_data.py`, and how they meet what a work dir has settled already.

A setting that shapes data is None on the command line unless given: it then comes from the work dir's manifest, else
from `DEFAULTS`. The first task that uses a setting writes it to the manifest; from then on another value is refused.
"""

import dataclasses
from typing import Any

from megatron_retro.config.flags import check_timeout, flag, flag_name
from megatron_retro.errors import UserError
from megatron_retro.workdir import WorkDir

TASKS = ("tokenize", "db-build", "embed", "index-train", "index-add", "query-neighbors")

CHANGES = ("add-documents", "remove-documents", "compact")  # of a finished work dir; one a run
RETRIEVERS = ("dense", "bm25", "hybrid")

DEFAULTS: dict[str, Any] = {
    "json_key": "text",
    "vocab_size": 32000,
    "seed": 1234,
    "split": "98,1,1",
    "retro_chunk_length": 64,
    "retro_exclude_corpora": (),
    "retro_block_size": None,
    "retro_embedder": "all-MiniLM-L6-v2",
    "retro_index_str": "auto",
    "retro_index_memory_gb": None,
    "retro_retriever": "dense",
    "retro_target_recall": 0.95,
    "retro_index_nprobe": None,
    "retro_query_num_neighbors_save": 10,
}

# Which task settles which setting.
TASK_SETTINGS: dict[str, tuple[str, ...]] = {
    "tokenize": ("json_key", "vocab_size", "seed"),
    "db-build": ("split", "retro_chunk_length", "retro_exclude_corpora"),
    "embed": ("retro_block_size", "retro_embedder"),
    "index-train": ("retro_index_str", "retro_index_memory_gb"),
    "index-add": (),
    "query-neighbors": (
        "retro_retriever",
        "retro_target_recall",
        "retro_index_nprobe",
        "retro_query_num_neighbors_save",
    ),
}


@dataclasses.dataclass(frozen=True)
class WorkGroup:
    """what to do, and where"""

    retro_work_dir: str | None = flag(None, "directory of everything this program writes (required)")
    retro_tasks: str = flag(
        "build",
        f"build (all), or a comma list in order: {','.join(TASKS)}; or one change of a finished work dir: "
        f"{' | '.join(CHANGES)}",
    )
    verify_data: str = flag(
        "quick",
        "what is damaged is made again; quick: sizes, small files, samples of large ones; full: every byte",
        choices=("quick", "full"),
    )
    distributed_timeout_minutes: float = flag(10, "minutes without a sign of a rank until the others give it up")
    seed: int | None = flag(None, "seed of the tokenizer's, the index's and the recall sample", show="1234")


@dataclasses.dataclass(frozen=True)
class DocumentGroup:
    """documents (needed once; later runs take them from the work dir)"""

    input: tuple[str, ...] = flag(
        (),
        ".jsonl, .jsonl.gz, .jsonl.zst, .txt or .parquet files or directories of them; each is one corpus",
        many=True,
    )
    data_path: tuple[str, ...] = flag(
        (), "[WEIGHT] PREFIX …: Megatron .bin/.idx prefixes, used in place; needs --tokenizer-model", many=True
    )
    retro_project_dir: str | None = flag(
        None, "RETRO project of Megatron-LM up to 0.15: its corpora, tokenizer, splits, index and neighbors are taken"
    )
    json_key: str | None = flag(None, "key of a JSON line (column of a Parquet file) that holds the text", show="text")
    document_ids: str | None = flag(
        None, "remove-documents: a file with one document id, <corpus>:<number>, a line; numbers count from 0"
    )
    strict: bool = flag(False, "refuse a bad record, naming its file and line, instead of counting and skipping it")
    split: str | None = flag(None, "shares of train, valid and test, by document", show="98,1,1")
    retro_exclude_corpora: tuple[str, ...] = flag(
        (), "names of corpora to train on that are no part of the database", many=True
    )


@dataclasses.dataclass(frozen=True)
class TokenizerGroup:
    """tokenizer"""

    tokenizer_model: str | None = flag(
        None,
        "SentencePiece .model, Hugging Face tokenizer.json, or a directory that holds one",
        show="trained on a sample of the documents",
    )
    vocab_file: str | None = flag(None, "vocab.json of a GPT-2 tokenizer, with --merge-file")
    merge_file: str | None = flag(None, "merges.txt of a GPT-2 tokenizer, with --vocab-file")
    vocab_size: int | None = flag(None, "pieces of a trained tokenizer, fewer if the text is small", show="32000")


@dataclasses.dataclass(frozen=True)
class RetrievalGroup:
    """chunks, embeddings, index, neighbors"""

    retro_chunk_length: int | None = flag(None, "tokens a chunk", show="64")
    retro_block_size: int | None = flag(None, "chunks a file of embeddings or neighbors", show="by number of chunks")
    retro_embedder: str | None = flag(
        None, "sentence-transformers or BERT checkpoint: directory or name", show="all-MiniLM-L6-v2"
    )
    retro_embedder_batch_size: int = flag(32, "chunks a forward pass")
    retro_index_str: str | None = flag(None, "FAISS factory string", show="auto: by number of chunks")
    retro_index_memory_gb: float | None = flag(
        None, "gigabytes that an index of auto may take", show="half of this machine's memory"
    )
    retro_retriever: str | None = flag(
        None, "dense: nearest embeddings; bm25: shared words; hybrid: 200 nearest, ranked by BM25", show="dense"
    )
    retro_target_recall: float | None = flag(
        None, "share of the true two nearest neighbors that an approximate index must find", show="0.95"
    )
    retro_index_nprobe: int | None = flag(
        None, "inverted lists a query looks into", show="the fewest that reach --retro-target-recall"
    )
    retro_query_num_neighbors_save: int | None = flag(None, "neighbors saved for each chunk", show="10")


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """Everything `tools/preprocess_retro_data.py` can be told.

    Raises:
        UserError: a value that can never be right.
    """

    work: WorkGroup
    documents: DocumentGroup
    tokenizer: TokenizerGroup
    retrieval: RetrievalGroup

    def __post_init__(self) -> None:
        if not self.work.retro_work_dir:
            raise UserError("--retro-work-dir is required: the directory to build in")
        self.tasks()
        split_weights(self.documents.split or DEFAULTS["split"])
        positive = {**dataclasses.asdict(self.retrieval), "vocab_size": self.tokenizer.vocab_size}
        for name, value in positive.items():
            if isinstance(value, int) and value < 1:
                raise UserError(f"{flag_name(name)} is {value}; it takes a whole number of at least 1")
        target, memory = self.retrieval.retro_target_recall, self.retrieval.retro_index_memory_gb
        if target is not None and not 0 < target <= 1:
            raise UserError(f"--retro-target-recall is {target:g}; it lies above 0 and up to 1")
        if memory is not None and not 0 < memory < float("inf"):
            raise UserError(f"--retro-index-memory-gb is {memory:g}; it must be above 0")
        if self.retrieval.retro_retriever not in (None, *RETRIEVERS):
            raise UserError(
                f"--retro-retriever is {self.retrieval.retro_retriever!r}; it takes {', '.join(RETRIEVERS)}"
            )
        tokenizer = self.tokenizer
        if bool(tokenizer.vocab_file) != bool(tokenizer.merge_file):
            alone = "vocab_file" if tokenizer.vocab_file else "merge_file"
            raise UserError(f"{flag_name(alone)} is given alone; a GPT-2 tokenizer is --vocab-file and --merge-file")
        if tokenizer.tokenizer_model and tokenizer.vocab_file:
            raise UserError(
                f"--tokenizer-model {tokenizer.tokenizer_model} and --vocab-file {tokenizer.vocab_file} are two "
                "tokenizers; give one"
            )
        if self.documents.document_ids and self.tasks() != ("remove-documents",):
            raise UserError("--document-ids goes with --retro-tasks remove-documents")
        check_timeout(self.work.distributed_timeout_minutes)
        if self.work.seed is not None and self.work.seed < 0:
            raise UserError(f"--seed is {self.work.seed}; it takes a whole number of at least 0")

    def tokenizer_paths(self) -> list[str]:
        """What was given as tokenizer: `--tokenizer-model`, or `--vocab-file` and `--merge-file`, or nothing."""
        given = (self.tokenizer.tokenizer_model, self.tokenizer.vocab_file, self.tokenizer.merge_file)
        return [path for path in given if path]

    def tasks(self) -> tuple[str, ...]:
        """The tasks to do, in order.

        Raises:
            UserError: an unknown task, or tasks out of order.
        """
        if self.work.retro_tasks == "build":
            return TASKS
        given = tuple(task.strip() for task in self.work.retro_tasks.split(","))
        if given[0] in CHANGES and len(given) == 1:
            return given
        for task in given:
            if task not in TASKS:
                raise UserError(
                    f"--retro-tasks names {task!r}; it takes build, some of {','.join(TASKS)}, "
                    f"or one of {','.join(CHANGES)}"
                )
        if list(given) != sorted(set(given), key=TASKS.index):
            raise UserError(f"--retro-tasks is {self.work.retro_tasks}; the order is {','.join(TASKS)}, each once")
        return given

    def given(self) -> dict[str, Any]:
        """The data-shaping settings that the user gave."""
        flat: dict[str, Any] = {}
        for group in (self.work, self.documents, self.tokenizer, self.retrieval):
            flat.update(dataclasses.asdict(group))
        flat["retro_exclude_corpora"] = list(flat["retro_exclude_corpora"]) or None
        return {name: flat[name] for name in DEFAULTS if flat[name] is not None}


def check_given(config: PreprocessConfig, work: WorkDir) -> None:
    """Refuse settings that the work dir has settled otherwise.

    Raises:
        UserError: names the flag and both values.
    """
    for name, value in config.given().items():
        if name in work.settings and work.settings[name] != value:
            raise UserError(
                f"{flag_name(name)} is {value}, but --retro-work-dir {work.path} was made with {work.settings[name]}; "
                "leave the flag out, or build a new work dir"
            )


def settle(config: PreprocessConfig, work: WorkDir, task: str) -> None:
    """Put the settings of `task` into `work.settings` where they are not there already.

    The caller writes the manifest once they have proven good, so that a wrong flag can be given again rightly.
    """
    given = config.given()
    for name in TASK_SETTINGS[task]:
        work.settings.setdefault(name, given.get(name, DEFAULTS[name]))


def split_weights(split: str) -> tuple[float, ...]:
    """ "98,1,1" as numbers.

    Raises:
        UserError: not three shares, or no share for train.
    """
    try:
        weights = tuple(float(weight) for weight in split.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 3 or not all(0 <= weight < float("inf") for weight in weights) or weights[0] <= 0:
        raise UserError(f"--split is {split!r}; it takes three shares like 98,1,1 with a train share above 0")
    return weights
