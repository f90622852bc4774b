"""What is compared after a campaign's violence: the bytes of directories, the tensors of checkpoints."""

import hashlib
import pathlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_ONE_AT_A_TIME = threading.Lock()  # megatron-core has one world a process


def tree(directory: pathlib.Path, ignored: tuple[str, ...] = ("report",)) -> dict[str, str]:
    """Relative path -> hash of every file; empty directories count too. `ignored` names are left out at the top."""
    found = {}
    for place in sorted(directory.rglob("*")):
        name = place.relative_to(directory)
        if name.parts[0] not in ignored:
            found[str(name)] = hash_of(place.read_bytes()) if place.is_file() else "directory"
    return found


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What tells two results apart, in words; "" where they are equal."""
    missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    told = {"missing": missing, "too many": more, "different": other}
    return "; ".join(f"{what}: {', '.join(map(str, names[:5]))}" for what, names in told.items() if names)


def checkpoint_hashes(directory: pathlib.Path) -> dict[str, str]:
    """A hash of every unsharded tensor of a checkpoint, and of what it holds beside tensors (scheduler, counters)."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_retro import mcore

    with _ONE_AT_A_TIME, warnings.catch_warnings():
        if not mcore.parallel_state.model_parallel_is_initialized():
            mcore.initialize()
        warnings.simplefilter("ignore")
        state = dist_checkpointing.load_plain_tensors(str(directory))
    found = {}
    for name, value in _flat("", state):
        content = repr(value.shape if isinstance(value, torch.Tensor) else value).encode()
        if isinstance(value, torch.Tensor):
            content += value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        found[name] = hash_of(content)
    return found


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts and lists, under their paths."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}.{key}" if name else str(key), part)
    else:
        yield name, value
