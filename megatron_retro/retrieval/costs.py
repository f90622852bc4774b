"""What building a work dir has cost: `report/costs.json`, figures for people that differ from run to run."""

import json
from typing import Any

from megatron_retro.reading import parse_json
from megatron_retro.storage import write_atomically
from megatron_retro.workdir import WorkDir


def read(work: WorkDir) -> dict[str, dict[str, Any]]:
    """`seconds` and `peak_memory_mb` by task, and what was `measured`; empty where nothing is known."""
    try:
        return dict(parse_json((work.path / "report" / "costs.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def note(work: WorkDir, kind: str, **figures: Any) -> None:
    """Put figures beside those there are (by one rank)."""
    costs = read(work)
    costs[kind] = costs.get(kind, {}) | figures
    text = json.dumps(costs, indent=1)
    write_atomically(work.path / "report" / "costs.json", lambda file: file.write(text.encode()))
