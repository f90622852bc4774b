"""A database that learns and forgets: documents added to, removed from and purged from a finished work dir.

A change builds the next state beside the present one: a second manifest, `manifest.next.json`, and new files under new
names. When all is there, the second manifest takes the first one's name. So a reader sees the old state or the new one,
and an interrupted change goes on when it is asked for again.

A document's id is `<corpus>:<number>`, its place in its corpus from 0 on. It never changes: added documents are new
corpora, and a purged document keeps an empty place.
"""

import copy
import pathlib
import shutil
from typing import Any

import numpy as np

from megatron_retro import distributed
from megatron_retro.config.preprocessing import PreprocessConfig
from megatron_retro.data.chunks import ChunkTable, Corpus, removed_documents
from megatron_retro.errors import UserError
from megatron_retro.reading import read_text
from megatron_retro.retrieval import room, stages
from megatron_retro.retrieval.blocks import Advance, RowTable, make_blocks, plan
from megatron_retro.retrieval.corpora import begin, describe, remove_parts, tokenize
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.retrieval.progress import say
from megatron_retro.retrieval.query import ENDINGS, Saved, query
from megatron_retro.storage import fingerprint, replacing, save_npy
from megatron_retro.workdir import NEXT, STAGES, WorkDir


def change(work: WorkDir, config: PreprocessConfig) -> None:
    """Do `--retro-tasks add-documents`, `remove-documents` or `compact`; every rank calls it.

    Raises:
        UserError: the work dir is not finished, another change is, or the documents are not there.
    """
    task = config.tasks()[0]
    work.facts("neighbors")
    after = WorkDir(work.path, NEXT)
    is_new = not distributed.together((work.path / NEXT).exists)
    after.on_rank_0(lambda: _begin(task, work, after, config))
    if not (work.path / NEXT).exists():
        return
    try:
        if task == "compact":
            _purge(work, after, config)
        else:
            _refresh(work, after, config)
    except UserError:
        if is_new and distributed.rank() == 0:  # what was refused does not stand in the way of what comes next
            (work.path / NEXT).unlink(missing_ok=True)
        raise
    after.verify()
    work.on_rank_0(lambda: _publish(after))
    work.reload()
    say(f"{task}: done; {work.facts('chunks')['database_chunks']:,} chunks in the database")


def _begin(task: str, work: WorkDir, after: WorkDir, config: PreprocessConfig) -> None:
    """Write the second manifest: what the change starts from."""
    described = {"task": task, "what": _describe(task, work, config)}
    if (work.path / NEXT).exists():
        if after.settings["change"] != described:
            waiting = after.settings["change"]["task"]
            raise UserError(
                f"--retro-tasks {task}: an unfinished {waiting} waits in {work.path}; finish it with the same flags, "
                f"or remove {work.path / NEXT} to drop it"
            )
        return
    remove_parts(work)  # what a crash right behind the end of the change before has left
    work.tidy()
    if task == "compact" and not described["what"] and _is_compact(work):
        _remove_obsolete(work)  # what a crash right behind its end has left
    if not (described["what"] or (task == "compact" and _obsolete(work))):
        nothing = {"add-documents": "these documents are there", "remove-documents": "these documents are removed"}
        say(f"nothing to do: {nothing.get(task, 'no removed document and no superseded file is left')}")
        return
    _forget_dropped(work)
    settings = copy.deepcopy(work.settings)
    generation = settings["generation"] = _next_generation(work)
    renewed = STAGES[2:] if task == "compact" else ("neighbors",)
    settings["directories"] = settings.get("directories", {}) | {stage: f"{stage}.{generation}" for stage in renewed}
    settings["change"] = described
    history = {"task": task, "from": work.manifest["stages"]["neighbors"]["digest"], "number": generation}
    settings["history"] = [*settings.get("history", []), history]
    if task == "add-documents":
        settings["sources"] = settings["sources"] + described["what"]
    if task == "remove-documents":
        settings["removed"] = f"chunks/removed.{generation}.npy"
        save_npy(work.path / settings["removed"], np.unique(np.concatenate([_removed(work), _documents(work, config)])))
    if task == "compact":
        settings["index_shards"] = []
    kept = STAGES[:1] if task != "remove-documents" else STAGES[:2]
    after.manifest["settings"] = settings
    after.manifest["stages"] = {stage: work.manifest["stages"][stage] for stage in kept}
    after.write()


def _next_generation(work: WorkDir) -> int:
    """A number that no change has used, not even one that was dropped."""
    places = [*work.path.glob("*.[0-9]*"), *work.path.glob("index*/bm25.[0-9]*")]
    numbers = (place.name.rpartition(".")[2] for place in places if place.is_dir())
    return max([work.settings.get("generation", 0), *(int(number) for number in numbers if number.isdecimal())]) + 1


def _forget_dropped(work: WorkDir) -> None:
    """Delete blocks and shards that a dropped change has left under names that the next one will use."""
    dropped = {"embeddings": "*.npy", "index": "shard-*.faiss"}
    obsolete = set(_obsolete(work))
    for stage, pattern in dropped.items():
        for file in work.directory(stage).rglob(pattern):
            if file in obsolete:
                file.unlink()


def _describe(task: str, work: WorkDir, config: PreprocessConfig) -> Any:
    """What tells one change from another, in plain values; empty where there is nothing to do."""
    if task == "add-documents":
        if not config.documents.input:
            raise UserError("--retro-tasks add-documents needs --input: the documents to add")
        there = {source["name"]: source for source in work.settings["sources"]}
        given = describe(config)
        for source in given:
            if source["name"] in there and source != there[source["name"]]:
                raise UserError(
                    f"--input {source['path']} would be corpus {source['name']!r}, which --retro-work-dir {work.path} "
                    "has already with other documents; rename the file"
                )
        return [source for source in given if source["name"] not in there]
    if task == "remove-documents":
        new = np.setdiff1d(_documents(work, config), _removed(work))
        return fingerprint(pathlib.Path(config.documents.document_ids or "")) if len(new) else ""
    table = ChunkTable.open(work)
    return int(np.diff(table.first_chunk)[table.removed].sum())


def _removed(work: WorkDir) -> np.ndarray:
    removed = work.settings.get("removed")
    return removed_documents(work.path / removed) if removed else np.zeros(0, np.int64)


def _documents(work: WorkDir, config: PreprocessConfig) -> np.ndarray:
    """The documents of `--document-ids` as numbers over all corpora, ascending int64."""
    given = config.documents.document_ids
    if not given:
        raise UserError("--retro-tasks remove-documents needs --document-ids: a file with one <corpus>:<number> a line")
    lines = read_text(f"--document-ids {given}", pathlib.Path(given)).splitlines()
    corpora = work.facts("chunks")["corpora"]
    first, begin = {}, 0
    for corpus in corpora:
        first[corpus["name"]] = (begin, corpus["documents"])
        begin += corpus["documents"]
    documents = []
    for number, line in enumerate(lines, 1):
        name, _, local = line.strip().rpartition(":")
        if not line.strip():
            continue
        if name not in first or not local.isdecimal() or len(local) > 18 or int(local) >= first[name][1]:
            known = ", ".join(f"{name}:0 … {name}:{count - 1}" for name, (_, count) in first.items())
            raise UserError(f"--document-ids {given}:{number}: no document {line.strip()!r}; there are {known}")
        documents.append(first[name][0] + int(local))
    return np.unique(np.array(documents, np.int64))


def _publish(after: WorkDir) -> None:
    after.publish()
    remove_parts(after)
    after.tidy()
    if _is_compact(after):
        _remove_obsolete(after)


def _is_compact(work: WorkDir) -> bool:
    """Whether the last change was `compact`."""
    return bool(work.settings.get("change", {}).get("task") == "compact")


def _remove_obsolete(work: WorkDir) -> None:
    for file in _obsolete(work):
        file.unlink(missing_ok=True)
    for place in sorted(work.path.rglob("*"), reverse=True):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _obsolete(work: WorkDir) -> list[pathlib.Path]:
    """Data files that no record names; damaged ones that were set aside are kept."""
    named = {name for record in work.manifest["stages"].values() for name in record["files"]}
    places = [place for stage in STAGES[1:] for place in work.path.glob(f"{stage}*") if place.is_dir()]
    files = [
        (file, str(file.relative_to(work.path))) for place in places for file in place.rglob("*") if file.is_file()
    ]
    return sorted(file for file, name in files if name not in named and ".damaged" not in name)


# ------------------------------------------------------------------------------------------------ add, remove


def _refresh(work: WorkDir, after: WorkDir, config: PreprocessConfig) -> None:
    """Do again what follows from the documents; blocks and shards that are there already stay."""
    known = {entry["name"]: entry for entry in work.facts("corpus")["corpora"]}
    if not after.has("corpus"):
        known = begin(after, config, known)
    _check_room(work, after, config, known)
    if not after.has("corpus"):
        tokenize(after, config, known)
    if not after.has("chunks"):
        stages.build_chunks(after, config)
    if after.facts("chunks")["documents"] == work.facts("chunks")["documents"]:
        after.on_rank_0(lambda: _keep(work, after))
    if not after.has("embeddings"):
        stages.embed(after, config)
    if not after.has("index"):
        stages.fill_index(after, config)
    if not after.has("neighbors"):
        query(after, config, Saved(work))


def _check_room(work: WorkDir, after: WorkDir, config: PreprocessConfig, known: dict[str, dict[str, Any]]) -> None:
    """Refuse a change that would fill the disk."""
    tasks = {"corpus": "tokenize", "chunks": "db-build", "embeddings": "embed", "index": "index-add"}
    tasks["neighbors"] = "query-neighbors"
    todo, width = [task for stage, task in tasks.items() if not after.has(stage)], work.facts("embeddings")["width"]
    after.on_rank_0(lambda: room.check(after, config, todo, width, known))


def _keep(work: WorkDir, after: WorkDir) -> None:
    """Record embeddings and index as they are: a search passes over what the database holds no more."""
    for stage in ("embeddings", "index"):
        files = [work.path / name for name in work.manifest["stages"][stage]["files"]]
        after.commit(stage, work.facts(stage), files)


# ------------------------------------------------------------------------------------------------ compact


def _purge(work: WorkDir, after: WorkDir, config: PreprocessConfig) -> None:
    """Write everything again without the removed documents; nothing is computed anew but the index's shards."""
    old = distributed.together(lambda: ChunkTable.open(work))
    if not after.has("corpus"):
        after.on_rank_0(lambda: _purge_corpora(work, after, old))
    _check_room(work, after, config, {})
    if not after.has("chunks"):
        stages.build_chunks(after, config)
    new = distributed.together(lambda: ChunkTable.open(after))
    if not after.has("embeddings"):
        _copy_rows(work, after, old, new, "embeddings", ".npy")
    if not after.has("index"):
        work.on_rank_0(lambda: _copy_trained(work, after))
        stages.fill_index(after, config)
    if not after.has("neighbors"):
        if work.settings["retro_retriever"] == "dense":
            _copy_neighbors(work, after, old, new)
        else:
            query(after, config)


def _purge_corpora(work: WorkDir, after: WorkDir, old: ChunkTable) -> None:
    from megatron_retro.data.tokenize import write_documents

    entries, files = [], []
    for number, entry in enumerate(work.facts("corpus")["corpora"]):
        begin, end = old.corpus_documents[number : number + 2]
        removed = old.removed[begin:end]
        if removed.any():
            corpus = Corpus.open(entry["name"], str(work.path / entry["prefix"]))
            prefix = work.path / "corpus" / f"{entry['name']}.{after.settings['generation']}"
            documents = (corpus.tokens[start : start + length] for start, length in _runs(corpus, removed))
            write_documents(prefix, documents, corpus.tokens.dtype.type)
            tokens = int(corpus.length[~removed].sum())
            entry = {**entry, "prefix": f"corpus/{prefix.name}", "tokens": tokens}
        entries.append(entry)
        files += [pathlib.Path(f"{work.path / entry['prefix']}{suffix}") for suffix in (".bin", ".idx")]
    after.commit("corpus", {"corpora": entries}, files)


def _runs(corpus: Corpus, removed: np.ndarray) -> Any:
    """(first token, tokens) of every document; none of a removed one."""
    return zip(corpus.start, np.where(removed, 0, corpus.length), strict=True)


def _old_ids(old: ChunkTable, new: ChunkTable, chunks: np.ndarray) -> np.ndarray:
    """Chunk ids after the purge as chunk ids before it."""
    document = new.document(chunks)
    return old.first_chunk[document] + chunks - new.first_chunk[document]


def _copy_rows(work: WorkDir, after: WorkDir, old: ChunkTable, new: ChunkTable, stage: str, suffix: str) -> None:
    facts = work.facts("embeddings")
    table = RowTable(work, stage, plan(work, facts["block_size"]), suffix, np.float16, facts["width"])
    blocks = plan(after, facts["block_size"])
    unfinished = distributed.together(lambda: after.unfinished(stage))

    def make(numbers: list[int], advance: Advance) -> None:
        for number in numbers:
            block = blocks[number]
            save_npy(block.path(after, stage, suffix), table.rows(_old_ids(old, new, block.ids)))
            unfinished.note(block.path(after, stage, suffix))
            advance(len(block))

    def is_made(number: int) -> bool:
        return unfinished.has(blocks[number].path(after, stage, suffix))

    make_blocks(f"compact {stage}", [len(block) for block in blocks], is_made, make)
    after.on_rank_0(lambda: after.commit(stage, facts, [block.path(after, stage, suffix) for block in blocks]))


def _copy_trained(work: WorkDir, after: WorkDir) -> None:
    target = stages.trained_index(after)
    if not stages.is_trained(after):
        with replacing(target) as temporary:
            shutil.copyfile(stages.trained_index(work), temporary)
        after.unfinished("index").note(target)


def _copy_neighbors(work: WorkDir, after: WorkDir, old: ChunkTable, new: ChunkTable) -> None:
    table, facts = NeighborTable(work, old), work.facts("neighbors")
    blocks = plan(after, facts["block_size"])
    unfinished = distributed.together(lambda: after.unfinished("neighbors"))
    shift = new.first_chunk[:-1] - old.first_chunk[:-1]

    def make(numbers: list[int], advance: Advance) -> None:
        for number in numbers:
            block = blocks[number]
            chunks = _old_ids(old, new, block.ids)
            ids = table.ids(chunks)
            moved = np.where(ids < 0, -1, ids + shift[old.document(np.maximum(ids, 0))])
            save_npy(block.path(after, "neighbors", ".distances.npy"), table.distances(chunks))
            save_npy(block.path(after, "neighbors", ".ids.npy"), moved)
            unfinished.note(*files_of(number))
            advance(len(block))

    def is_made(number: int) -> bool:
        return unfinished.has(*files_of(number))

    def files_of(number: int) -> list[pathlib.Path]:
        return [blocks[number].path(after, "neighbors", ending) for ending in ENDINGS]

    make_blocks("compact neighbors", [len(block) for block in blocks], is_made, make)
    files = [path for number in range(len(blocks)) for path in files_of(number)]
    after.on_rank_0(lambda: after.commit("neighbors", facts, files))
