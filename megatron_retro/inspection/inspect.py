"""What `tools/inspect_retro_data.py` does."""

import pathlib

from megatron_retro.config.inspection import InspectConfig
from megatron_retro.errors import UserError
from megatron_retro.retrieval.progress import say
from megatron_retro.storage import check_writable
from megatron_retro.workdir import STAGES, WorkDir


def inspect(config: InspectConfig) -> None:
    """Write the page, answer the query, or both.

    Raises:
        UserError: a flag is wrong, a stage is not finished, or the page cannot be written.
    """
    config.finish()
    work = WorkDir(config.page.retro_work_dir or "")
    if not (work.path / "manifest.json").exists():
        raise UserError(
            f"--retro-work-dir {work.path} holds no manifest.json; tools/preprocess_retro_data.py builds one"
        )
    work.verify(STAGES)
    if config.page.output:
        _write_page(work, pathlib.Path(config.page.output), config.page.max_chunks, config.page.seed)
    if config.query.query is not None:
        from megatron_retro.inspection import terminal

        print(terminal.answer(work, config.query.query, config.query.k, as_json=config.query.json))


def _write_page(work: WorkDir, directory: pathlib.Path, max_chunks: int, seed: int) -> None:
    from megatron_retro.inspection.collect import collect
    from megatron_retro.inspection.page import write_page

    check_writable("--output", directory)
    path = write_page(directory, collect(work, max_chunks, seed))
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
