"""The preprocessing tasks, in order, from documents to neighbors.

Every task is skipped when the manifest has its stage, goes on with the blocks that an interrupted run left, and shares
out its blocks: rank r makes the blocks b with b % world_size == r. Only rank 0 writes the manifest, when all are there.
Heavy libraries are imported by the tasks that need them, so a run with nothing to do ends at once.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from megatron_retro import distributed, watch
from megatron_retro.config.preprocessing import CHANGES, PreprocessConfig, check_given
from megatron_retro.errors import UserError
from megatron_retro.retrieval import costs, room, stages
from megatron_retro.retrieval.corpora import begin, check_sources, remove_parts, tokenize
from megatron_retro.retrieval.progress import duration, forget_peak_memory, peak_memory, say
from megatron_retro.storage import check_writable, lock, remove
from megatron_retro.workdir import NEXT, STAGES, WorkDir

# The stage that records a task as finished; index-train is finished when its file is there.
_STAGE = {"tokenize": "corpus", "db-build": "chunks", "embed": "embeddings", "index-add": "index"}
_STAGE["query-neighbors"] = "neighbors"


def preprocess(config: PreprocessConfig) -> None:
    """Do the tasks of `--retro-tasks` that are not done yet, on this rank.

    Raises:
        UserError: bad input or flags, on every rank.
    """
    work = WorkDir(config.work.retro_work_dir or "", full=config.work.verify_data == "full")
    if config.documents.retro_project_dir:
        from megatron_retro.retrieval.project import with_project

        config = with_project(config)
    check_given(config, work)
    is_change = config.tasks()[0] in CHANGES
    if not is_change:
        check_sources(config, work)
    distributed.init_gloo(config.work.distributed_timeout_minutes)
    watch.at("the check of the work dir")
    distributed.together(lambda: check_writable("--retro-work-dir", work.path))
    work.on_rank_0(work.renew_copy)
    if is_change:
        return _change(work, config)
    if (work.path / NEXT).exists():
        waiting = WorkDir(work.path, NEXT).settings["change"]["task"]
        say(f"note: an unfinished {waiting} waits in {work.path}; --retro-tasks {waiting} goes on with it")
    _set_damaged_aside(work)
    todo = distributed.all_gather([task for task in config.tasks() if not is_done(work, task)])[0]
    if not todo and _is_summarized(work):
        say(f"nothing to do: {', '.join(config.tasks())} finished in {work.path}")
        return
    _use_cores()
    width = distributed.together(lambda: stages.check_engines(work, config, todo) if distributed.rank() == 0 else None)
    with _locked(work):
        for number, task in enumerate(todo):
            _run(todo[number:], work, config, width, tell=number == 0)
            if task == "db-build":
                work.on_rank_0(lambda: stages.check_index(work, config, todo, width))
    _summarize(work)


def _change(work: WorkDir, config: PreprocessConfig) -> None:
    from megatron_retro.retrieval.changes import change

    _use_cores()
    watch.at(config.tasks()[0])
    work.verify(tuple(work.manifest["stages"]))
    before = work.manifest
    with _locked(work):
        change(work, config)
    after = WorkDir(work.path)
    if after.manifest != before:
        _summarize(after)


def _set_damaged_aside(work: WorkDir) -> None:
    """What is not what it was gets another name, and is made again by its task."""
    recorded = tuple(stage for stage in STAGES if work.has(stage))
    damaged = work.damaged(recorded)
    if damaged:
        work.on_rank_0(lambda: work.set_damaged_aside(damaged))
    distributed.together(lambda: work.check_chain(tuple(stage for stage in recorded if work.has(stage))))
    if not (work.path / NEXT).exists():
        work.on_rank_0(lambda: _tidy(work))


def _tidy(work: WorkDir) -> None:
    """Remove what a crash right behind the end of a task has left."""
    work.tidy()
    if work.has("corpus"):
        remove_parts(work)


def is_done(work: WorkDir, task: str) -> bool:
    if task == "index-train":
        return stages.is_trained(work)
    return work.has(_STAGE[task]) and (task != "tokenize" or work.has("tokenizer"))


@contextlib.contextmanager
def _locked(work: WorkDir) -> Iterator[None]:
    """Around writing to a work dir; every rank calls it. Where nothing was written, nothing is left."""
    is_new = not work.path.exists()
    file = distributed.together(lambda: lock("--retro-work-dir", work.path) if distributed.rank() == 0 else None)
    try:
        yield
    finally:
        if file:
            file.close()
            if is_new and [inside.name for inside in work.path.iterdir()] == [".lock"]:
                remove(work.path)


def _use_cores() -> None:
    import faiss

    faiss.omp_set_num_threads(distributed.use_this_ranks_share())


def _run(todo: list[str], work: WorkDir, config: PreprocessConfig, width: int | None, *, tell: bool) -> None:
    """Do the first one of `todo`, if there is room for all of them."""
    task, start = todo[0], time.monotonic()
    watch.at(task)
    forget_peak_memory()
    known = begin(work, config, {}) if task == "tokenize" else {}
    work.on_rank_0(lambda: room.check(work, config, todo, width, known, tell=tell))
    if task == "tokenize":
        tokenize(work, config, known)
    elif task == "db-build":
        stages.build_chunks(work, config)
    elif task == "embed":
        stages.embed(work, config)
    elif task == "index-train":
        stages.train_index(work, config)
    elif task == "index-add":
        stages.fill_index(work, config)
    elif task == "query-neighbors":
        from megatron_retro.retrieval.query import query

        query(work, config, _known_neighbors(work))
    else:
        raise UserError(f"--retro-tasks: no task {task}")
    peak = max(distributed.all_gather(peak_memory()))
    work.on_rank_0(lambda: _record_cost(work, task, time.monotonic() - start, peak))
    say(f"{task}: done in {duration(time.monotonic() - start)}")


def _known_neighbors(work: WorkDir) -> Any:
    """Those of a Megatron project, if the work dir is made from one."""
    if not stages.project_dir(work):
        return None
    from megatron_retro.retrieval.project_import import ProjectNeighbors

    return ProjectNeighbors(work)


def _record_cost(work: WorkDir, task: str, more: float, peak: int) -> None:
    before = costs.read(work)
    costs.note(work, "seconds", **{task: round(before.get("seconds", {}).get(task, 0) + more, 1)})
    costs.note(work, "peak_memory_mb", **{task: max(before.get("peak_memory_mb", {}).get(task, 0), round(peak / 1e6))})


def _is_summarized(work: WorkDir) -> bool:
    return not work.has("neighbors") or (work.path / "report" / "summary.json").exists()


def _summarize(work: WorkDir) -> None:
    watch.at("the summary")
    if work.has("neighbors"):
        from megatron_retro.retrieval.summary import summarize

        summarize(work)
