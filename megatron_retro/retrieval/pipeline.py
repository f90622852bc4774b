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
from megatron_retro.retrieval.progress import Progress, duration, say
from megatron_retro.workdir import WorkDir, fingerprint, write_atomically

TOKENIZER_SAMPLE_BYTES = 20_000_000

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
    _check_sources(config, work)
    todo = [task for task in config.tasks() if not is_done(work, task)]
    if not todo:
        say(f"nothing to do: {', '.join(config.tasks())} finished in {work.path}")
        return
    distributed.init_gloo(timeout_minutes=60 * _HOURS_A_TASK)
    _use_this_ranks_share()
    on_rank_0(work, lambda: work.verify(tuple(work.manifest["stages"])))
    for task in distributed.all_gather(todo)[0]:
        start = time.monotonic()
        _TASKS[task](work, config)
        on_rank_0(work, lambda task=task, start=start: _record_seconds(work, task, start))  # type: ignore[misc]
        say(f"{task}: done in {duration(time.monotonic() - start)}")
    if work.has("neighbors"):
        on_rank_0(work, lambda: _summarize(work))


def is_done(work: WorkDir, task: str) -> bool:
    if task == "index-train":
        return work.has("index") or (work.path / "index" / "trained.faiss").exists()
    return work.has(_STAGE[task])


def on_rank_0(work: WorkDir, act: Callable[[], Any]) -> None:
    """Let rank 0 act while the others wait; then all read the manifest again."""
    distributed.together(lambda: act() if distributed.rank() == 0 else None)
    work.reload()


def _use_this_ranks_share() -> None:
    import faiss

    faiss.omp_set_num_threads(distributed.use_this_ranks_share())


# ------------------------------------------------------------------------------------------------ tokenize


def _check_sources(config: PreprocessConfig, work: WorkDir) -> None:
    """Refuse an `--input`, `--data-path` or `--tokenizer-model` that is not what the work dir was made from."""
    documents, settings = config.documents, work.settings
    if not (documents.input or documents.data_path or "sources" in settings):
        raise UserError("--input or --data-path is needed to begin a work dir: the documents to learn from")
    if (documents.input or documents.data_path) and "sources" in settings:
        given, recorded = _describe(config), settings["sources"]
        if given != recorded:
            pairs = zip([*given, *[{}] * len(recorded)], [*recorded, *[{}] * len(given)], strict=False)
            ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
            raise UserError(
                f"--input/--data-path is {_told(ours)}, but --retro-work-dir {work.path} was made from "
                f"{_told(theirs)}; leave the flag out, or build a new work dir"
            )
    if config.tokenizer.tokenizer_model and "tokenizer" in settings:
        found = _tokenizer_print(config)
        if found != settings["tokenizer"]:
            raise UserError(
                f"--tokenizer-model {config.tokenizer.tokenizer_model} is {found}, but --retro-work-dir {work.path} "
                f"was made with {settings['tokenizer']}; leave the flag out, or build a new work dir"
            )


def _told(source: dict[str, Any]) -> str:
    return f"{source['path']} ({source['fingerprint']}, weight {source['weight']:g})" if source else "nothing"


def _tokenizer_print(config: PreprocessConfig) -> str:
    model = config.tokenizer.tokenizer_model
    if model is None:
        return "trained on the documents"
    if not pathlib.Path(model).is_file():
        raise UserError(f"--tokenizer-model {model}: no such file")
    return fingerprint(pathlib.Path(model))


def _describe(config: PreprocessConfig) -> list[dict[str, Any]]:
    """What the corpora are made from, in plain values."""
    from megatron_retro.data.documents import find_sources

    described = [
        {"name": source.name, "path": source.path, "fingerprint": source.fingerprint(), "weight": 0.0, "tokens": False}
        for source in find_sources(config.documents.input)
    ]
    for weight, prefix in _weighted_prefixes(config.documents.data_path):
        described.append(
            {"name": pathlib.Path(prefix).name, "path": prefix, "fingerprint": "", "weight": weight, "tokens": True}
        )
    names = [source["name"] for source in described]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--input and --data-path name corpus {name!r} more than once; rename one")
    return described


def _weighted_prefixes(values: tuple[str, ...]) -> list[tuple[float, str]]:
    """Megatron's two forms: `PREFIX …` (weight 0: by size) or `WEIGHT PREFIX WEIGHT PREFIX …`."""
    try:
        weights = [float(value) for value in values[::2]] if len(values) > 1 else []
    except ValueError:
        weights = []
    if not weights:
        return [(0.0, str(pathlib.Path(prefix).absolute())) for prefix in values]
    if len(values) % 2 or min(weights) <= 0:
        raise UserError(f"--data-path {' '.join(values)}: every prefix needs a weight above 0 before it, or none does")
    return [
        (weight, str(pathlib.Path(prefix).absolute())) for weight, prefix in zip(weights, values[1::2], strict=True)
    ]


def _tokenize(work: WorkDir, config: PreprocessConfig) -> None:
    on_rank_0(work, lambda: _begin(work, config))
    corpora = [
        _use_in_place(work, source) if source["tokens"] else _tokenize_documents(work, source, config)
        for source in work.settings["sources"]
    ]
    on_rank_0(work, lambda: _commit_corpus(work, corpora))


def _begin(work: WorkDir, config: PreprocessConfig) -> None:
    """Settle what the work dir is made from, and its tokenizer; written together, so a refused flag leaves no trace."""
    settle(config, work, "tokenize")
    _settle_sources(work, config)
    if not work.has("tokenizer"):
        _make_tokenizer(work, config)


def _settle_sources(work: WorkDir, config: PreprocessConfig) -> None:
    from megatron_retro.data.documents import Source

    if "sources" not in work.settings:
        work.settings["sources"] = _describe(config)
        if config.documents.data_path and config.tokenizer.tokenizer_model is None:
            raise UserError("--data-path needs --tokenizer-model: the tokenizer that made its tokens")
        work.settings["tokenizer"] = _tokenizer_print(config)
    for source in work.settings["sources"]:
        found = "" if source["tokens"] else Source.find(source["path"]).fingerprint()
        if found != source["fingerprint"]:
            raise UserError(
                f"--input {source['path']} was {source['fingerprint']} when --retro-work-dir {work.path} was begun, "
                f"is now {found}; restore the files, or build a new work dir"
            )


def _make_tokenizer(work: WorkDir, config: PreprocessConfig) -> None:
    from megatron_retro.data.tokenizer import Tokenizer

    model = config.tokenizer.tokenizer_model
    if model:
        _check_tokenizer(work, Tokenizer.open(model))
    content = pathlib.Path(model).read_bytes() if model else _train_tokenizer(work)
    suffix = ".json" if (model or "").endswith(".json") else ".model"
    path = work.path / "tokenizer" / f"tokenizer{suffix}"
    write_atomically(path, lambda file: file.write(content))
    made = Tokenizer.open(path)
    facts = {"file": f"tokenizer/{path.name}", "vocab_size": made.vocab_size, "eod": made.eod, "pad": made.pad}
    work.commit("tokenizer", facts, [path])


def _check_tokenizer(work: WorkDir, tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot have made the Megatron corpora."""
    from megatron_retro.data.chunks import Corpus
    from megatron_retro.data.tokenize import check_token_ids

    for source in work.settings["sources"]:
        if source["tokens"]:
            tokens = Corpus.open(source["name"], source["path"]).tokens
            check_token_ids(source["name"], tokens, tokenizer.vocab_size)


def _train_tokenizer(work: WorkDir) -> bytes:
    from megatron_retro.data import tokenizer
    from megatron_retro.data.documents import Source
    from megatron_retro.data.tokenize import sample_texts

    settings = work.settings

    def records() -> Any:
        sources = [Source.find(source["path"]) for source in settings["sources"]]
        with Progress(
            "sample for the tokenizer", sum(source.num_bytes for source in sources), "bytes of input"
        ) as progress:
            for source in sources:
                yield from source.records(settings["json_key"], progress.advance)

    texts = sample_texts(records(), settings["json_key"], settings["seed"], TOKENIZER_SAMPLE_BYTES)
    say(f"tokenizer: training on {len(texts):,} documents of {sum(map(len, texts)):,} characters")
    return tokenizer.train(texts, settings["vocab_size"])


def _open_tokenizer(work: WorkDir) -> Any:
    from megatron_retro.data.tokenizer import Tokenizer

    return Tokenizer.open(work.path / work.facts("tokenizer")["file"])


def _use_in_place(work: WorkDir, source: dict[str, Any]) -> dict[str, Any]:
    """The corpus entry of a Megatron prefix."""
    from megatron_retro.data.chunks import Corpus

    def look() -> dict[str, Any]:
        corpus = Corpus.open(source["name"], source["path"])
        counts = {"documents": len(corpus.length), "tokens": int(corpus.length.sum()), "skipped": {}}
        return {"name": source["name"], "prefix": source["path"], "weight": source["weight"], **counts}

    return distributed.together(look)


def _tokenize_documents(work: WorkDir, source: dict[str, Any], config: PreprocessConfig) -> dict[str, Any]:
    """Tokenize one `--input` argument; the corpus entry."""
    from megatron_retro.data.tokenize import merge_parts, token_dtype

    tokenizer = _open_tokenizer(work)
    parts = distributed.together(lambda: _write_parts(work, source, tokenizer, strict=config.documents.strict))
    prefix = work.path / "corpus" / source["name"]
    dtype = token_dtype(tokenizer.vocab_size)
    counts = distributed.together(lambda: merge_parts(parts, prefix, dtype) if distributed.rank() == 0 else {})
    return {"name": source["name"], "prefix": f"corpus/{source['name']}", "weight": source["weight"], **counts}


def _write_parts(work: WorkDir, source: dict[str, Any], tokenizer: Any, *, strict: bool) -> list[pathlib.Path]:
    """Write this rank's parts; the prefixes of all."""
    from megatron_retro.data import documents
    from megatron_retro.data.tokenize import part_is_complete, write_part

    parts, key = [], work.settings["json_key"]
    files = documents.Source.find(source["path"])
    with Progress(f"tokenize {source['name']}", files.num_bytes, "bytes of input") as progress:
        for number, block in enumerate(documents.blocks(files.records(key, progress.advance))):
            parts.append(_part(work, source["name"], number))
            if number % distributed.world_size() == distributed.rank() and not part_is_complete(parts[-1]):
                write_part(parts[-1], block, tokenizer, key, strict=strict)
    return parts


def _part(work: WorkDir, name: str, number: int) -> pathlib.Path:
    return work.path / "corpus" / f"{name}.parts" / f"{number:08d}"


def _commit_corpus(work: WorkDir, corpora: list[dict[str, Any]]) -> None:
    from megatron_retro.data.tokenize import remove_parts

    files = []
    for corpus in corpora:
        if not corpus["documents"]:
            raise UserError(f"corpus {corpus['name']!r} has no document with text (skipped: {corpus['skipped']})")
        files += [pathlib.Path(f"{work.path / corpus['prefix']}{suffix}") for suffix in (".bin", ".idx")]
    work.commit("corpus", {"corpora": corpora}, files)
    for corpus in corpora:
        directory = work.path / "corpus" / f"{corpus['name']}.parts"
        if directory.is_dir():
            remove_parts(sorted({file.with_suffix("") for file in directory.iterdir()}))


# ------------------------------------------------------------------------------------------------ db-build


def _build_chunks(work: WorkDir, config: PreprocessConfig) -> None:
    on_rank_0(work, lambda: _commit_chunks(work, config))


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
    on_rank_0(work, lambda: _settle_embedder(work, config))
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

    table, tokenizer = distributed.together(lambda: (ChunkTable.open(work), _open_tokenizer(work)))
    _make_blocks("embed", [len(block) for block in blocks], is_made, make)
    facts = {
        "embedder": settings["retro_embedder"],
        "weights": settings["embedder_weights"],
        "dtype": settings["embedder_dtype"],
        "width": embedder.width,
        "block_size": block_size,
    }
    files = [block.path(work, "embeddings") for block in blocks]
    on_rank_0(work, lambda: work.commit("embeddings", facts, files))


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
    on_rank_0(work, lambda: _write_trained(work, config))


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
    on_rank_0(work, lambda: _settle_shards(work))
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
    on_rank_0(work, lambda: work.commit("index", facts, files))


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

    on_rank_0(work, lambda: _settle_query(work, config))
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
    on_rank_0(work, lambda: work.commit("neighbors", {"num_neighbors": k, "nprobe": nprobe}, files))


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
    "tokenize": _tokenize,
    "db-build": _build_chunks,
    "embed": _embed,
    "index-train": _train_index,
    "index-add": _fill_index,
    "query-neighbors": _query,
}
