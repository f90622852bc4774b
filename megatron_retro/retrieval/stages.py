"""The tasks from tokens to a filled index: `db-build`, `embed`, `index-train`, `index-add`.

Heavy libraries are imported by the tasks that need them, so a run with nothing to do ends at once.
"""

import os
import pathlib
from typing import Any

from megatron_retro import distributed
from megatron_retro.config.preprocessing import DEFAULTS, PreprocessConfig, settle, split_weights
from megatron_retro.errors import UserError
from megatron_retro.retrieval.blocks import Advance, auto_block_size, make_blocks, plan
from megatron_retro.retrieval.corpora import open_tokenizer
from megatron_retro.retrieval.progress import say
from megatron_retro.workdir import Unfinished, WorkDir


def check_engines(work: WorkDir, config: PreprocessConfig, todo: list[str]) -> int | None:
    """Refuse an embedder or an index that cannot be, before hours of work on what comes before them.

    Returns:
        E; None where only the embedder could tell, and nothing is to be embedded.

    Raises:
        UserError: the embedder cannot be loaded, or FAISS cannot make the index.
    """
    from megatron_retro.retrieval.embedding import Embedder, checkpoint_width

    if work.has("embeddings"):
        width = work.facts("embeddings")["width"]
    else:
        name = _setting(work, config, "retro_embedder")
        width = checkpoint_width(name)
        if "embed" in todo:
            width = Embedder(name, "float32", 1).width
    check_index(work, config, todo, width)
    return width


def check_index(work: WorkDir, config: PreprocessConfig, todo: list[str], width: int | None) -> None:
    """Refuse an index that cannot be, as far as is known already: for a width, for a number of chunks.

    Its size is a matter of the run that trains it, maybe on another machine.

    Raises:
        UserError: names the flag.
    """
    from megatron_retro.retrieval.index import check_factory, check_size, choose_factory

    if width is None or is_trained(work):
        return
    factory = _setting(work, config, "retro_index_str")
    if work.has("chunks") and "index-train" in todo:
        num_chunks = work.facts("chunks")["database_chunks"]
        memory = _setting(work, config, "retro_index_memory_gb") or half_of_memory()
        check_size(choose_factory(factory, num_chunks, width, memory), num_chunks, width)
    elif factory != "auto":
        check_factory(factory, width)


def _setting(work: WorkDir, config: PreprocessConfig, name: str) -> Any:
    """The value that a task will settle."""
    return work.settings.get(name) or config.given().get(name, DEFAULTS[name])


# ------------------------------------------------------------------------------------------------ db-build


def build_chunks(work: WorkDir, config: PreprocessConfig) -> None:
    work.on_rank_0(lambda: _commit_chunks(work, config))


def _commit_chunks(work: WorkDir, config: PreprocessConfig) -> None:
    from megatron_retro.data.chunks import ChunkTable, open_corpora, removed_documents
    from megatron_retro.retrieval.database import Database
    from megatron_retro.storage import save_npy

    settle(config, work, "db-build")
    length, weights = work.settings["retro_chunk_length"], split_weights(work.settings["split"])
    excluded = list(work.settings.get("retro_exclude_corpora", ()))
    opened = open_corpora(work, excluded)
    for name in excluded:
        if name not in {corpus.name for corpus in opened}:
            known = ", ".join(corpus.name for corpus in opened)
            raise UserError(f"--retro-exclude-corpora: the work dir has no corpus {name!r}; it has {known}")
    removed = work.settings.get("removed")  # a file of document ids
    gone, in_order = removed_documents(work.path / removed) if removed else None, "retro_project_dir" in work.settings
    table = ChunkTable(opened, length, gone, in_order=in_order)
    corpora, files = [], [work.path / removed] if removed else []
    for number, corpus in enumerate(opened):
        begin, end = table.corpus_documents[number : number + 2]
        first_chunk = table.first_chunk[begin : end + 1] - table.first_chunk[begin]
        corpora.append({"name": corpus.name, "documents": int(end - begin), "chunks": int(first_chunk[-1])})
        files.append(work.directory("chunks") / f"{corpus.name}.npy")
        save_npy(files[-1], first_chunk)
    counts = {"chunks": table.num_chunks, "tokens": table.num_tokens, "documents": table.num_documents}
    counts["removed_documents"] = int(table.removed.sum())
    counts["database_chunks"] = len(Database.open(table, weights))
    facts = {"chunk_length": length, "split": list(weights), "corpora": corpora, "removed": removed, **counts}
    facts["excluded_corpora"] = excluded
    if in_order:
        facts["in_order"] = True
    if project_dir(work):
        from megatron_retro.retrieval.project_import import describe_database

        facts["project"] = describe_database(work, table)
    work.commit("chunks", facts, files)


def project_dir(work: WorkDir) -> str | None:
    """The `--retro-project-dir` that a work dir is made from; None once its documents have changed."""
    return None if work.settings.get("generation") else work.settings.get("retro_project_dir")


# ------------------------------------------------------------------------------------------------ embed


def embed(work: WorkDir, config: PreprocessConfig) -> None:
    """Embed every chunk once."""
    import numpy as np

    from megatron_retro.data.chunks import ChunkTable
    from megatron_retro.retrieval.embedding import Embedder, chunk_texts
    from megatron_retro.storage import save_npy

    work.on_rank_0(lambda: _settle_embedder(work, config))
    settings, batch_size = work.settings, config.retrieval.retro_embedder_batch_size
    blocks = plan(work, settings["embedded_block_size"])
    unfinished = distributed.together(lambda: work.unfinished("embeddings"))
    embedder = distributed.together(
        lambda: Embedder(settings["retro_embedder"], settings["embedder_dtype"], batch_size)
    )
    table, tokenizer = distributed.together(lambda: (ChunkTable.open(work), open_tokenizer(work)))

    def make(numbers: list[int], advance: Advance) -> None:
        def texts(number: int) -> list[str]:
            return chunk_texts(table, blocks[number].ids, tokenizer)

        def write(number: int, embeddings: np.ndarray) -> None:
            save_npy(blocks[number].path(work, "embeddings"), embeddings)
            unfinished.note(blocks[number].path(work, "embeddings"))

        embedder.embed_blocks(numbers, texts, write, advance)

    def is_made(number: int) -> bool:
        return unfinished.has(blocks[number].path(work, "embeddings"))

    sizes = [len(block) for block in blocks]
    make_blocks("embed", sizes, is_made, make, chunks_at_once=sum(sizes))
    facts = {
        "embedder": settings["retro_embedder"],
        "weights": settings["embedder_weights"],
        "dtype": settings["embedder_dtype"],
        "width": embedder.width,
        "block_size": settings["embedded_block_size"],
    }
    files = [block.path(work, "embeddings") for block in blocks]
    work.on_rank_0(lambda: work.commit("embeddings", facts, files))


def _settle_embedder(work: WorkDir, config: PreprocessConfig) -> None:
    """Fix the embedder's weights, number type and block size, so that every block is made alike, now and later."""
    from megatron_retro.retrieval.embedding import fastest_dtype, weights_print

    settle(config, work, "embed")
    name, settings = work.settings["retro_embedder"], work.settings
    found = weights_print(name)
    if settings.setdefault("embedder_weights", found) != found:
        raise UserError(
            f"--retro-embedder {name} has weights {found}, the blocks in --retro-work-dir {work.path} were made with "
            f"{settings['embedder_weights']}; restore the checkpoint, or build a new work dir"
        )
    if "embedder_dtype" not in settings:
        settings["embedder_dtype"] = fastest_dtype(name, config.retrieval.retro_embedder_batch_size)
    size = settings["retro_block_size"] or auto_block_size(work.facts("chunks")["chunks"])
    settings.setdefault("embedded_block_size", size)
    say(f"embed: {name} in {settings['embedder_dtype']}")
    work.write()


# ------------------------------------------------------------------------------------------------ index


def open_database(work: WorkDir) -> tuple[Any, Any, Any]:
    """(chunk table, embeddings, database)."""
    from megatron_retro.data.chunks import ChunkTable
    from megatron_retro.retrieval.database import Database
    from megatron_retro.retrieval.embedding import EmbeddingTable

    table = ChunkTable.open(work)
    return table, EmbeddingTable(work), Database.open(table, split_weights(work.settings["split"]))


def trained_index(work: WorkDir) -> pathlib.Path:
    return work.directory("index") / "trained.faiss"


def is_trained(work: WorkDir) -> bool:
    """Whether the index is trained, or was even filled."""
    if work.has("index") or not work.has("embeddings"):
        return work.has("index")
    trained = trained_index(work)
    return trained.exists() and work.name(trained) in work.unfinished("index").prints


def train_index(work: WorkDir, config: PreprocessConfig) -> None:
    work.on_rank_0(lambda: _write_trained(work, config))


def _write_trained(work: WorkDir, config: PreprocessConfig) -> None:
    import faiss

    from megatron_retro.retrieval import index

    settle(config, work, "index-train")
    table, embeddings, database = open_database(work)
    width = work.facts("embeddings")["width"]
    if taken := _project_index(work, table, embeddings, width):
        work.settings["index_factory"], work.settings["project_index"] = taken.factory, str(taken.path)
        work.write()
        index.write_index(trained_index(work), taken.empty())
        work.unfinished("index").note(trained_index(work))
        return
    memory = work.settings["retro_index_memory_gb"] or half_of_memory()
    factory = index.choose_factory(work.settings["retro_index_str"], len(database), width, memory)
    say(f"index-train: {factory} for {len(database):,} chunks")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads * distributed.local_world_size())  # the other ranks are waiting
    trained = index.train_index(factory, embeddings, database, width, work.settings["seed"])
    faiss.omp_set_num_threads(threads)
    work.settings["index_factory"] = factory
    work.write()
    index.write_index(trained_index(work), trained)
    work.unfinished("index").note(trained_index(work))


def _project_index(work: WorkDir, table: Any, embeddings: Any, width: int) -> Any:
    """The index of the Megatron project that a work dir is made from; None where it has none that holds here."""
    if not project_dir(work):
        return None
    from megatron_retro.retrieval.project_index import ProjectIndex

    found = ProjectIndex.open(work, table)
    if found is None:
        say("index-train: the project has no index of this kind; it is built here")
        return None
    reason = found.why_not(embeddings, width)
    say(f"index-train: {found.path} is {f'built again here: {reason}' if reason else 'taken over'}")
    return None if reason else found


def half_of_memory() -> float:
    """Of this machine, in GB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2e9


def fill_index(work: WorkDir, config: PreprocessConfig) -> None:
    """Every rank fills shards of its own, each with the database's chunks of a range of blocks."""
    import numpy as np

    from megatron_retro.retrieval.index import fill, read_index, write_index
    from megatron_retro.retrieval.project_index import ProjectIndex

    trained = trained_index(work)
    unfinished = distributed.together(lambda: work.unfinished("index"))
    distributed.together(lambda: _check_trained(work, unfinished) if distributed.rank() == 0 else None)
    width = work.facts("embeddings")["width"]
    work.on_rank_0(lambda: _settle_shards(work))
    table, embeddings, database = distributed.together(lambda: open_database(work))
    ranges = [(first, end) for first, end in work.settings["index_shards"]]
    shards = [[block for block in embeddings.blocks if first <= block.first < end] for first, end in ranges]

    is_taken = bool(project_dir(work)) and "project_index" in work.settings
    theirs = distributed.together(lambda: ProjectIndex.open(work, table)) if is_taken else None

    def make(numbers: list[int], advance: Advance) -> None:
        for number in numbers:
            index = read_index(trained, width)
            there = theirs.copy_to(index, shards[number], database) if theirs else np.zeros(0, np.int64)
            fill(index, shards[number], embeddings, database, advance, there)
            write_index(shard_path(work, *ranges[number]), index)
            unfinished.note(shard_path(work, *ranges[number]))

    sizes = [sum(map(len, shard)) for shard in shards]
    distributed.together(lambda: read_index(trained, width) and None)
    make_blocks("index-add", sizes, lambda number: unfinished.has(shard_path(work, *ranges[number])), make)
    paths = [shard_path(work, *shard) for shard in ranges]
    num_bytes = sum(path.stat().st_size for path in paths)
    facts = {
        "factory": work.settings["index_factory"],
        "shards": work.settings["index_shards"],
        "database_chunks": len(database),
        "width": width,
        "bytes_per_vector": round(num_bytes / len(database), 1),
    }
    if theirs:
        facts["project_index"] = str(theirs.path)
    work.on_rank_0(lambda: work.commit("index", facts, [trained, *paths]))


def _check_trained(work: WorkDir, unfinished: Unfinished) -> None:
    if not unfinished.has(trained_index(work)):
        raise UserError(f"--retro-work-dir {work.path} has no trained index; --retro-tasks index-train comes first")


def _settle_shards(work: WorkDir) -> None:
    """Shards follow from the chunks alone, so that a later run can go on with any number of ranks."""
    from megatron_retro.retrieval.embedding import EmbeddingTable
    from megatron_retro.retrieval.index import choose_num_shards, plan_shards

    planned = work.settings.setdefault("index_shards", [])
    covered = planned[-1][1] if planned else 0
    blocks = [block for block in EmbeddingTable(work).blocks if block.first >= covered]
    num_shards = min(len(blocks), choose_num_shards(sum(map(len, blocks))))
    for shard in plan_shards(blocks, num_shards) if blocks else []:
        planned.append([shard[0].first, shard[-1].first + len(shard[-1])])
    work.write()


def shard_path(work: WorkDir, first: int, end: int) -> pathlib.Path:
    """The shard of the chunks `first` … `end`-1."""
    return work.directory("index") / f"shard-{first}-{end}.faiss"
