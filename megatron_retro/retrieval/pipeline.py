"""The preprocessing tasks, in order, from documents to neighbors.

Every task is skipped when the manifest has its stage, goes on with the blocks that an interrupted run left, and shares
out its blocks: rank r makes the blocks b with b % world_size == r. Only rank 0 writes the manifest, when all are there.
Heavy libraries are imported by the tasks that need them, so a run with nothing to do ends at once.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any

from megatron_retro import distributed
from megatron_retro.config.preprocessing import PreprocessConfig, check_given, settle, split_weights
from megatron_retro.errors import UserError
from megatron_retro.retrieval.corpora import check_sources, open_tokenizer, tokenize
from megatron_retro.retrieval.progress import Progress, duration, say
from megatron_retro.workdir import WorkDir, check_writable

Advance = Callable[[int], None]  # told how many units of work were done

_QUERIES_AT_ONCE = 1024
_HOURS_A_TASK = 7 * 24  # a rank may wait so long for the slowest one

# The stage that records a task as finished; index-train is finished when its file is there.
_STAGE = {"tokenize": "corpus", "db-build": "chunks", "embed": "embeddings", "index-add": "index"}
_STAGE["query-neighbors"] = "neighbors"


def preprocess(config: PreprocessConfig) -> None:
    """Do the tasks of `--retro-tasks` that are not done yet, on this rank.

    Raises:
        UserError: bad input or flags, on every rank.
    """
    work = WorkDir(config.work.retro_work_dir or "")
    check_given(config, work)
    check_sources(config, work)
    todo = [task for task in config.tasks() if not is_done(work, task)]
    if not todo:
        say(f"nothing to do: {', '.join(config.tasks())} finished in {work.path}")
        return
    distributed.init_gloo(timeout_minutes=60 * _HOURS_A_TASK)
    _use_this_ranks_share()
    distributed.together(lambda: check_writable("--retro-work-dir", work.path))
    work.on_rank_0(lambda: work.verify(tuple(work.manifest["stages"])))
    for task in distributed.all_gather(todo)[0]:
        start = time.monotonic()
        _TASKS[task](work, config)
        work.on_rank_0(lambda task=task, start=start: _record_seconds(work, task, start))  # type: ignore[misc]
        say(f"{task}: done in {duration(time.monotonic() - start)}")
    if work.has("neighbors"):
        work.on_rank_0(lambda: _summarize(work))


def is_done(work: WorkDir, task: str) -> bool:
    if task == "index-train":
        return work.has("index") or (work.path / "index" / "trained.faiss").exists()
    return work.has(_STAGE[task])


def _use_this_ranks_share() -> None:
    import faiss

    faiss.omp_set_num_threads(distributed.use_this_ranks_share())


# ------------------------------------------------------------------------------------------------ db-build


def _build_chunks(work: WorkDir, config: PreprocessConfig) -> None:
    work.on_rank_0(lambda: _commit_chunks(work, config))


def _commit_chunks(work: WorkDir, config: PreprocessConfig) -> None:
    from megatron_retro.data.chunks import ChunkTable, Corpus
    from megatron_retro.retrieval.index import database_chunks
    from megatron_retro.workdir import save_npy

    settle(config, work, "db-build")
    length, weights = work.settings["retro_chunk_length"], split_weights(work.settings["split"])
    entries = work.facts("corpus")["corpora"]
    opened = [Corpus.open(entry["name"], str(work.path / entry["prefix"]), entry["weight"]) for entry in entries]
    table = ChunkTable(opened, length)
    corpora, files = [], []
    for number, corpus in enumerate(opened):
        begin, end = table.corpus_documents[number : number + 2]
        first_chunk = table.first_chunk[begin : end + 1] - table.first_chunk[begin]
        corpora.append({"name": corpus.name, "documents": int(end - begin), "chunks": int(first_chunk[-1])})
        files.append(work.path / "chunks" / f"{corpus.name}.npy")
        save_npy(files[-1], first_chunk)
    counts = {"chunks": table.num_chunks, "tokens": table.num_tokens, "documents": table.num_documents}
    counts["database_chunks"] = len(database_chunks(table, weights))
    work.commit("chunks", {"chunk_length": length, "split": list(weights), "corpora": corpora, **counts}, files)


# ------------------------------------------------------------------------------------------------ embed


def _embed(work: WorkDir, config: PreprocessConfig) -> None:
    import numpy as np

    from megatron_retro.data.chunks import ChunkTable
    from megatron_retro.retrieval.blocks import auto_block_size, is_complete, plan
    from megatron_retro.retrieval.embedding import Embedder, chunk_texts
    from megatron_retro.workdir import save_npy

    batch_size = config.retrieval.retro_embedder_batch_size
    num_chunks = work.facts("chunks")["chunks"]
    work.on_rank_0(lambda: _settle_embedder(work, config))
    settings = work.settings
    block_size = settings["retro_block_size"] or auto_block_size(num_chunks)
    blocks = plan(work, block_size)
    embedder = distributed.together(
        lambda: Embedder(settings["retro_embedder"], settings["embedder_dtype"], batch_size)
    )

    def make(number: int, advance: Advance) -> None:
        texts = chunk_texts(table, blocks[number].ids, tokenizer)
        save_npy(blocks[number].path(work, "embeddings"), embedder.embed(texts, advance))

    def is_made(number: int) -> bool:
        path = blocks[number].path(work, "embeddings")
        return is_complete(path, (len(blocks[number]), embedder.width), np.float16)

    table, tokenizer = distributed.together(lambda: (ChunkTable.open(work), open_tokenizer(work)))
    _make_blocks("embed", [len(block) for block in blocks], is_made, make)
    facts = {
        "embedder": settings["retro_embedder"],
        "weights": settings["embedder_weights"],
        "dtype": settings["embedder_dtype"],
        "width": embedder.width,
        "block_size": block_size,
    }
    files = [block.path(work, "embeddings") for block in blocks]
    work.on_rank_0(lambda: work.commit("embeddings", facts, files))


def _settle_embedder(work: WorkDir, config: PreprocessConfig) -> None:
    """Fix the embedder's number type, and remember its weights, so that every block is made alike."""
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
    say(f"embed: {name} in {settings['embedder_dtype']}")
    work.write()


def _make_blocks(
    stage: str, sizes: list[int], is_made: Callable[[int], bool], make: Callable[[int, Advance], None]
) -> None:
    """Make this rank's blocks that are not there yet; returns when every rank has.

    Args:
        stage: name to show.
        sizes: chunks of each block.
        is_made: whether a block, by number, is there.
        make: makes one, telling how many chunks it has come further.
    """

    def share() -> None:
        mine = range(distributed.rank(), len(sizes), distributed.world_size())
        missing = [number for number in mine if not is_made(number)]
        total = sum(sizes[number] for number in mine)
        done = total - sum(sizes[number] for number in missing)
        with Progress(stage, total, "chunks", done) as progress:
            for number in missing:
                make(number, progress.advance)

    distributed.together(share)


# ------------------------------------------------------------------------------------------------ index


def _database(work: WorkDir) -> tuple[Any, Any, Any]:
    """(chunk table, embeddings, the database's chunk ids)."""
    from megatron_retro.data.chunks import ChunkTable
    from megatron_retro.retrieval.embedding import EmbeddingTable
    from megatron_retro.retrieval.index import database_chunks

    table, embeddings = ChunkTable.open(work), EmbeddingTable(work)
    return table, embeddings, database_chunks(table, split_weights(work.settings["split"]))


def _train_index(work: WorkDir, config: PreprocessConfig) -> None:
    work.on_rank_0(lambda: _write_trained(work, config))


def _write_trained(work: WorkDir, config: PreprocessConfig) -> None:
    from megatron_retro.retrieval.index import choose_factory, train_index, write_index

    settle(config, work, "index-train")
    _, embeddings, database = _database(work)
    width = work.facts("embeddings")["width"]
    factory = choose_factory(work.settings["retro_index_str"], len(database), width)
    say(f"index-train: {factory} for {len(database):,} chunks")
    index = train_index(factory, embeddings, database, width, work.settings["seed"])
    work.settings["index_factory"] = factory
    work.write()
    write_index(work.path / "index" / "trained.faiss", index)


def _fill_index(work: WorkDir, config: PreprocessConfig) -> None:
    from megatron_retro.retrieval.index import fill, plan_shards, read_index, write_index

    trained = work.path / "index" / "trained.faiss"
    if not trained.exists():
        raise UserError(f"--retro-work-dir {work.path} has no trained index; --retro-tasks index-train comes first")
    width = work.facts("embeddings")["width"]
    work.on_rank_0(lambda: _settle_shards(work))
    _, embeddings, database = distributed.together(lambda: _database(work))
    shards = plan_shards(embeddings.blocks, work.settings["index_shards"])

    def make(number: int, advance: Advance) -> None:
        index = read_index(trained, width)
        fill(index, shards[number], embeddings, database, advance)
        write_index(_shard(work, number), index)

    sizes = [sum(map(len, shard)) for shard in shards]
    distributed.together(lambda: read_index(trained, width) and None)
    _make_blocks("index-add", sizes, lambda number: _shard(work, number).exists(), make)
    facts = {
        "factory": work.settings["index_factory"],
        "shards": len(shards),
        "database_chunks": len(database),
        "width": width,
    }
    files = [trained, *(_shard(work, number) for number in range(len(shards)))]
    work.on_rank_0(lambda: work.commit("index", facts, files))


def _settle_shards(work: WorkDir) -> None:
    """As many shards as ranks at the first run, so that a later one can go on with any number of ranks."""
    from megatron_retro.retrieval.embedding import EmbeddingTable

    num_shards = min(distributed.world_size(), len(EmbeddingTable(work).blocks))
    work.settings.setdefault("index_shards", num_shards)
    work.write()


def _shard(work: WorkDir, number: int) -> pathlib.Path:
    return work.path / "index" / f"shard-{number}.faiss"


# ------------------------------------------------------------------------------------------------ neighbors


def _query(work: WorkDir, config: PreprocessConfig) -> None:
    import numpy as np

    from megatron_retro.retrieval.blocks import is_complete
    from megatron_retro.workdir import save_npy

    work.on_rank_0(lambda: _settle_query(work, config))
    k = work.settings["retro_query_num_neighbors_save"]
    table, embeddings, database = distributed.together(lambda: _database(work))
    search, nprobe = distributed.together(lambda: _open_search(work, embeddings, database))
    blocks = embeddings.blocks

    def make(number: int, advance: Advance) -> None:
        ids, distances = _query_block(search, table, embeddings, database, blocks[number].ids, k, advance)
        save_npy(blocks[number].path(work, "neighbors", ".distances.npy"), distances)
        save_npy(blocks[number].path(work, "neighbors", ".ids.npy"), ids)

    def is_made(number: int) -> bool:
        shape = (len(blocks[number]), k)
        kinds = ((".ids.npy", np.int64), (".distances.npy", np.float32))
        return all([is_complete(blocks[number].path(work, "neighbors", end), shape, dtype) for end, dtype in kinds])

    _make_blocks("query-neighbors", [len(block) for block in blocks], is_made, make)
    files = [block.path(work, "neighbors", end) for block in blocks for end in (".ids.npy", ".distances.npy")]
    work.on_rank_0(lambda: work.commit("neighbors", {"num_neighbors": k, "nprobe": nprobe}, files))


def _settle_query(work: WorkDir, config: PreprocessConfig) -> None:
    work.facts("index")
    settle(config, work, "query-neighbors")
    work.write()


def _query_block(
    search: Any, table: Any, embeddings: Any, database: Any, chunks: Any, k: int, advance: Advance
) -> tuple[Any, Any]:
    """Neighbors of consecutive chunks [n], checked: ids and distances [n, k]."""
    import numpy as np

    from megatron_retro.retrieval.neighbors import check_neighbors, own_chunks

    found = []
    for begin in range(0, len(chunks), _QUERIES_AT_ONCE):
        some = chunks[begin : begin + _QUERIES_AT_ONCE]
        own = own_chunks(table, some)
        ids, distances = search.search(embeddings.rows(some), own, k)
        check_neighbors(ids, distances, own, database)
        found.append((ids, distances))
        advance(len(some))
    return np.concatenate([ids for ids, _ in found]), np.concatenate([distances for _, distances in found])


def _open_search(work: WorkDir, embeddings: Any, database: Any) -> tuple[Any, int | None]:
    """The search that fits the index, and its nprobe (None for exact search)."""
    from megatron_retro import mcore
    from megatron_retro.retrieval.index import auto_nprobe, inverted_lists, read_index
    from megatron_retro.retrieval.neighbors import ExactSearch, IndexSearch

    facts, width = work.facts("index"), work.facts("embeddings")["width"]
    if facts["factory"] == "Flat":
        return ExactSearch(embeddings, database, mcore.device()), None
    shards = [read_index(_shard(work, number), width) for number in range(facts["shards"])]
    lists = inverted_lists(shards[0])
    num_lists = 1 if lists is None else lists.nlist
    nprobe = min(num_lists, work.settings["retro_index_nprobe"] or auto_nprobe(num_lists))
    return IndexSearch(shards, embeddings, database, nprobe), nprobe


# ------------------------------------------------------------------------------------------------ summary


def _record_seconds(work: WorkDir, task: str, start: float) -> None:
    seconds = work.settings.setdefault("seconds", {})
    seconds[task] = round(seconds.get(task, 0) + time.monotonic() - start, 1)
    work.write()


def _summarize(work: WorkDir) -> None:
    from megatron_retro.retrieval.summary import lines, summarize

    table, embeddings, database = _database(work)
    for line in lines(summarize(work, table, embeddings, database)):
        say(line)


_TASKS: dict[str, Callable[[WorkDir, PreprocessConfig], None]] = {
    "tokenize": tokenize,
    "db-build": _build_chunks,
    "embed": _embed,
    "index-train": _train_index,
    "index-add": _fill_index,
    "query-neighbors": _query,
}
