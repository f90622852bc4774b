"""The preprocessing tasks, in order, from documents to neighbors.

Every task is skipped when the manifest has its stage, goes on with the blocks that an interrupted run left, and shares
out its blocks: rank r makes the blocks b with b % world_size == r. Only rank 0 writes the manifest, when all are there.
Heavy libraries are imported by the tasks that need them, so a run with nothing to do ends at once.
"""

import time

from megatron_retro import distributed
from megatron_retro.config.preprocessing import CHANGES, PreprocessConfig, check_given
from megatron_retro.errors import UserError
from megatron_retro.retrieval import stages
from megatron_retro.retrieval.corpora import check_sources, tokenize
from megatron_retro.retrieval.progress import duration, forget_peak_memory, peak_memory, say
from megatron_retro.workdir import NEXT, WorkDir, check_writable

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
    if config.tasks()[0] in CHANGES:
        from megatron_retro.retrieval.changes import change

        _start(work)
        before = work.manifest
        change(work, config)
        after = WorkDir(work.path)
        if after.manifest != before:
            _summarize(after)
        return
    if (work.path / NEXT).exists():
        unfinished = WorkDir(work.path, NEXT).settings["change"]["task"]
        say(f"note: an unfinished {unfinished} waits in {work.path}; --retro-tasks {unfinished} goes on with it")
    check_sources(config, work)
    todo = [task for task in config.tasks() if not is_done(work, task)]
    if not todo:
        say(f"nothing to do: {', '.join(config.tasks())} finished in {work.path}")
        return
    _start(work)
    todo = distributed.all_gather(todo)[0]
    width = distributed.together(lambda: stages.check_engines(work, config, todo) if distributed.rank() == 0 else None)
    for task in todo:
        _run(task, work, config)
        if task == "db-build":
            work.on_rank_0(lambda: stages.check_index(work, config, todo, width))
    _summarize(work)


def is_done(work: WorkDir, task: str) -> bool:
    if task == "index-train":
        return work.has("index") or stages.trained_index(work).exists()
    return work.has(_STAGE[task])


def _start(work: WorkDir) -> None:
    """Join the ranks, and check what there is."""
    distributed.init_gloo(timeout_minutes=60 * _HOURS_A_TASK)
    import faiss

    faiss.omp_set_num_threads(distributed.use_this_ranks_share())
    distributed.together(lambda: check_writable("--retro-work-dir", work.path))
    work.on_rank_0(lambda: work.verify(tuple(work.manifest["stages"])))


def _run(task: str, work: WorkDir, config: PreprocessConfig) -> None:
    start = time.monotonic()
    forget_peak_memory()
    if task == "tokenize":
        tokenize(work, config)
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

        query(work, config)
    else:
        raise UserError(f"--retro-tasks: no task {task}")
    peak = max(distributed.all_gather(peak_memory()))
    work.on_rank_0(lambda: _record_cost(work, task, time.monotonic() - start, peak))
    say(f"{task}: done in {duration(time.monotonic() - start)}")


def _record_cost(work: WorkDir, task: str, more: float, peak: int) -> None:
    seconds, memory = work.settings.setdefault("seconds", {}), work.settings.setdefault("peak_memory_mb", {})
    seconds[task] = round(seconds.get(task, 0) + more, 1)
    memory[task] = max(memory.get(task, 0), round(peak / 1e6))
    work.write()


def _summarize(work: WorkDir) -> None:
    if work.has("neighbors"):
        from megatron_retro.retrieval.summary import summarize

        summarize(work)
