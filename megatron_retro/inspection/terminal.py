"""The nearest chunks of a text, for people and as JSON."""

import json
import sys
import textwrap
from typing import Any

from megatron_retro import terminal
from megatron_retro.retrieval.described import describe_neighbors
from megatron_retro.workdir import WorkDir


def answer(work: WorkDir, query: str, k: int, *, as_json: bool) -> str:
    """What to print: the `k` nearest chunks of the text, each with its continuation.

    Raises:
        UserError: a stage is not finished, or the embedder cannot be loaded.
    """
    found = search(work, query, k)
    if as_json:
        return json.dumps({"query": query, "neighbors": found}, indent=1)
    width, color = terminal.width(), sys.stdout.isatty()
    return "\n\n".join(_shown(neighbor, width, color=color) for neighbor in found) or "no chunk was found"


def search(work: WorkDir, query: str, k: int) -> list[dict[str, Any]]:
    """Rank, distance, chunk id, document, text and continuation of the `k` nearest chunks, or fewer if there are."""
    from megatron_retro.retrieval.live import LiveRetriever

    retriever = LiveRetriever(work)
    ids, distances = retriever.search([query], k)
    return describe_neighbors(retriever.table, retriever.tokenizer, ids[0], distances[0])


def _shown(neighbor: dict[str, Any], width: int, *, color: bool) -> str:
    head = f"{neighbor['rank']}.  {neighbor['document']}   distance {neighbor['distance']:.3f}"
    parts = [
        (terminal.BOLD, head),
        ("", _wrapped(neighbor["text"], width)),
        (terminal.DIM, _wrapped(neighbor["continuation"], width, "    … ")),
    ]
    return "\n".join(f"{style}{text}{terminal.PLAIN}" if color and style else text for style, text in parts if text)


def _wrapped(text: str, width: int, first: str = "    ") -> str:
    """The lines of a text, none longer than `width`, without what could steer a terminal."""
    lines = [terminal.printable(line) for line in text.splitlines() if line.strip()]
    wrapped = [part for line in lines for part in textwrap.wrap(line, width - len(first)) or [""]]
    return "\n".join((first if number == 0 else " " * len(first)) + line for number, line in enumerate(wrapped))
