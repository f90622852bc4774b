"""Checkpoints: one directory an update, complete or absent.

    <save>/iter_0000100/                       megatron-core's sharded weights and optimizer state,
                       run.json                the run's flags and counters, and what it was trained on
                       manifest.json           the fingerprint of each of these files
    <save>/latest_checkpointed_iteration.txt   the newest update's number, for people and other programs

The newest directory counts; each gets its name when all in it is on the disk. A checkpoint's files are compared with
their fingerprints before they are opened. Random states are not stored: every step draws from streams seeded by
(seed, step).
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any

import torch

from megatron_retro import distributed, mcore, storage
from megatron_retro.config import flags
from megatron_retro.config.model import ModelConfig, ParallelConfig, RetroConfig
from megatron_retro.config.training import PretrainConfig
from megatron_retro.errors import UserError

_LATEST = "latest_checkpointed_iteration.txt"

# What the weights' shapes and meaning depend on: a checkpoint's values must be the run's.
_FREE = {"hidden_dropout", "attention_dropout", "init_method_std", "seq_length", "max_position_embeddings"}
_FREE |= {"retro_work_dir", "retro_num_neighbors", "retro_retrieval_dropout", "retro_random_neighbor_prob"}
_FREE |= {"retro_max_overlap"}


@dataclasses.dataclass
class RunState:
    """How far a run has come, and on what.

    Attributes:
        iteration: updates done.
        consumed_samples: training samples read.
        config: the run's flags (`flags.to_dict`).
        vocab_size: padded.
        chunk_length: C.
        tokenizer_digest: of the tokenizer (the work dir's "tokenizer" record).
        data_digest: of tokenizer, corpus and chunks (the work dir's "chunks" record).
        losses, bad_in_a_row: see `bad_steps.LossWatch`.
    """

    iteration: int
    consumed_samples: int
    config: dict[str, Any]
    vocab_size: int
    chunk_length: int
    tokenizer_digest: str
    data_digest: str
    losses: list[float] = dataclasses.field(default_factory=list)
    bad_in_a_row: int = 0


def save(directory: str, model: torch.nn.Module, optimizer: Any, state: RunState) -> pathlib.Path:
    """Write a checkpoint; every rank calls it. A crash leaves the one before it in place.

    Raises:
        UserError: the disk is full, or cannot be written to.
    """
    root = pathlib.Path(directory)
    final = root / _name(state.iteration)
    partial = root / f"{final.name}.partial"
    with storage.explained(partial):
        distributed.together(lambda: _clear(final, partial))
        mcore.save_state(model, optimizer, str(partial))
        prints = distributed.all_gather(distributed.together(lambda: _sync_share(partial)))
        distributed.together(lambda: _publish(final, partial, state, prints))
    return final


def find(directory: str, iteration: int | None = None) -> pathlib.Path | None:
    """The newest complete checkpoint under `directory`, or that of an update; None where there is none.

    Raises:
        UserError: there is none of this update.
    """
    root = pathlib.Path(directory)
    if iteration is not None and not (root / _name(iteration)).is_dir():
        there = ", ".join(str(_iteration(path)) for path in _complete(root)) or "none"
        raise UserError(f"--ckpt-step {iteration}: --load {directory} has no such checkpoint, but {there}")
    if iteration is not None:
        return root / _name(iteration)
    return next(iter(_complete(root)), None)


def find_sound(directory: str, iteration: int | None = None, *, own: bool = False) -> pathlib.Path | None:
    """As `find`, but damaged ones are passed over, loudly; every rank calls it.

    Args:
        own: whether this run saves there; what is damaged then gets another name.

    Raises:
        UserError: all are damaged, or the one that `iteration` names.
    """
    while path := distributed.together(lambda: find(directory, iteration)):
        try:
            verify(path)
            return path
        except UserError as error:
            older = [other for other in _complete(path.parent) if _iteration(other) < _iteration(path)]
            if not (older and own and iteration is None):
                before = f", or take the one before it, {older[0].name}" if older else ""
                raise UserError(f"{error}; restore it from a backup{before}") from None
            line = f"{error}: moved aside; the run goes on from the checkpoint before it\n"
            distributed.together(functools.partial(_set_aside, path, line))
    return None


def verify(path: pathlib.Path) -> None:
    """Compare every byte of a checkpoint with its fingerprints; ranks share the reading, all call it.

    Raises:
        UserError: names a file, and both fingerprints, on every rank.
    """
    recorded = distributed.together(lambda: _recorded(path))

    def look() -> list[str]:
        mine = sorted(recorded.items())[distributed.rank() :: distributed.world_size()]
        return [name for name, was in mine if not storage.is_same(path / name, was, full=True)]

    for name in sorted(name for names in distributed.all_gather(distributed.together(look)) for name in names):
        raise UserError(
            f"checkpoint file {path / name} was {recorded[name]} when it was saved, is now {storage.found(path / name)}"
        )


def set_newer_aside(path: pathlib.Path) -> None:
    """Give other names to the checkpoints that are newer than one that a run goes back to."""
    for newer in _complete(path.parent) if distributed.rank() == 0 else []:
        if _iteration(newer) > _iteration(path):
            storage.set_aside(newer, "old")


def read_state(path: pathlib.Path) -> RunState:
    """The run state of a checkpoint found by `find`."""
    try:
        return RunState(**json.loads((path / "run.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / 'run.json'} is not a run's state ({error}); load another checkpoint") from None


def check_same_run(state: RunState, config: PretrainConfig, vocab_size: int, chunk_length: int, digest: str) -> None:
    """Check that a run may go on from a checkpoint.

    Raises:
        UserError: names the first differing value, and both.
    """
    ours = flags.to_dict(config)
    names = [field.name for group in (ModelConfig, RetroConfig) for field in dataclasses.fields(group)]
    retrieves = config.active_retro is not None
    for name in names:
        if name in _FREE or (not retrieves and name.startswith("retro_") and name != "retro_add_retriever"):
            continue
        _same(flags.flag_name(name), state.config.get(name), ours[name])
    distributed_optimizer = "use_distributed_optimizer"  # its state is laid out in a way of its own
    _same(
        flags.flag_name(distributed_optimizer),
        state.config.get(distributed_optimizer, False),
        ours[distributed_optimizer],
    )
    _same("the padded vocabulary", state.vocab_size, vocab_size)
    _same("the work dir's chunk length", state.chunk_length, chunk_length)
    _same("the work dir's digest of tokenizer, corpus and chunks", state.data_digest, digest)


def trains_alike(state: RunState, config: PretrainConfig) -> bool:
    """Whether a run's losses are what a checkpoint's run would have had: model, samples and optimizer are the same."""
    ours = flags.to_dict(config)
    groups = (config.model, config.retro, config.data, config.optimization)
    names = {field.name for group in groups for field in dataclasses.fields(group)}
    names -= {"train_iters", "lr_decay_iters", "lr_warmup_iters", "num_workers"}
    return all(state.config.get(name) == ours[name] for name in names)


def model_config_of(state: RunState) -> tuple[ModelConfig, RetroConfig | None]:
    """The finished shape that a checkpoint's weights have."""
    config = flags.from_dict(_Shape, {name: state.config[name] for name in _shape_names() if name in state.config})
    config.model.finish()
    config.retro.finish(config.model)
    return config.model, config.retro if config.retro.retro_add_retriever else None


@dataclasses.dataclass
class _Shape:
    model: ModelConfig
    retro: RetroConfig
    parallel: ParallelConfig


def _shape_names() -> list[str]:
    return [field.name for group in (ModelConfig, RetroConfig) for field in dataclasses.fields(group)]


def _same(what: str, checkpoint: Any, run: Any) -> None:
    if checkpoint != run:
        raise UserError(
            f"--load: {what} is {checkpoint} in the checkpoint, {run} in this run; "
            "use the checkpoint's value, or start a new run without --load"
        )


def _name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _iteration(path: pathlib.Path) -> int:
    return int(path.name.removeprefix("iter_"))


def _complete(root: pathlib.Path) -> list[pathlib.Path]:
    """Newest first."""
    found = [path for path in root.glob("iter_*") if path.name.removeprefix("iter_").isdecimal() and path.is_dir()]
    return sorted(found, key=_iteration, reverse=True)


def _recorded(path: pathlib.Path) -> dict[str, str]:
    """Name -> fingerprint of each file."""
    try:
        recorded = storage.read_sealed(path / "manifest.json")["files"]
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"checkpoint file {path / 'manifest.json'} is damaged ({error})") from None
    return dict(recorded)


def _set_aside(path: pathlib.Path, line: str) -> None:
    if distributed.rank() == 0:
        storage.set_aside(path)
        os.write(2, line.encode())


def _clear(final: pathlib.Path, partial: pathlib.Path) -> None:
    """Make room for the partial checkpoint; a complete one of the same update is set aside."""
    if distributed.rank():
        return
    storage.remove(partial)  # left by a crash inside a save; no complete checkpoint has this name
    if final.exists():
        storage.set_aside(final, "old")
    partial.mkdir(parents=True)


def _sync_share(partial: pathlib.Path) -> dict[str, str]:
    """Sync the files that this rank has written; their fingerprints by name."""
    prints = {}
    for file in sorted(partial.iterdir()):
        writer = re.match(r"__(\d+)_", file.name)  # megatron-core's names
        if (int(writer[1]) if writer else 0) == distributed.rank():
            storage.sync(file)
            prints[file.name] = storage.fingerprint(file)
    return prints


def _publish(final: pathlib.Path, partial: pathlib.Path, state: RunState, prints: list[dict[str, str]]) -> None:
    """Write what the checkpoint is, give it its name, then point to it."""
    if distributed.rank():
        return
    text = json.dumps(dataclasses.asdict(state), indent=1, sort_keys=True)
    storage.write_atomically(partial / "run.json", lambda file: file.write(text.encode()))
    files = {name: print_ for of_rank in prints for name, print_ in of_rank.items()}
    files["run.json"] = storage.fingerprint(partial / "run.json")
    storage.write_sealed(partial / "manifest.json", {"files": files})
    os.rename(partial, final)
    storage.sync(final.parent)
    storage.write_atomically(final.parent / _LATEST, lambda file: file.write(f"{state.iteration}\n".encode()))
