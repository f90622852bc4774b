"""Records of documents to Megatron's `.bin/.idx`: one document one sequence, each ending with the eod token.

The stream of records is cut into blocks (see `documents.blocks`), each rank tokenizes its blocks into parts, and
one rank puts the parts together in order: the same bytes for any number of ranks.
"""

import collections
import contextlib
import heapq
import json
import pathlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from megatron_retro.data.documents import BadRecord, Record
from megatron_retro.data.tokenizer import PIECE, Tokenizer, pieces
from megatron_retro.errors import UserError
from megatron_retro.storage import replacing, write_atomically

_WINDOW = 1 << 20  # tokens


def token_dtype(vocab_size: int) -> type[np.number]:
    """uint16 where every id fits, else int32 (Megatron's two)."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def sample_texts(records: Iterable[Record], key: str, seed: int, max_bytes: int) -> list[str]:
    """A random sample of documents of at most `max_bytes` in all, in one pass and bounded memory.

    Every record draws a priority; the smallest stay. The rest of a single document that is larger is cut off.
    """
    generator = random.Random(seed)
    kept: list[tuple[float, int, Record]] = []  # largest priority first
    num_bytes = 0
    for number, record in enumerate(records):
        heapq.heappush(kept, (-generator.random(), number, record))
        num_bytes += record.num_bytes
        while num_bytes > max_bytes and len(kept) > 1:
            num_bytes -= heapq.heappop(kept)[2].num_bytes
    texts = []
    for _, _, record in sorted(kept, key=lambda item: item[1]):
        try:
            texts.append(record.text(key)[:max_bytes])
        except BadRecord:
            continue  # counted, or refused, when it is tokenized
    return texts


def part_files(prefix: pathlib.Path) -> list[pathlib.Path]:
    """What `write_part` makes."""
    return [prefix.with_suffix(suffix) for suffix in (".bin", ".idx", ".json")]


def write_part(prefix: pathlib.Path, block: list[Record], tokenizer: Tokenizer, key: str, *, strict: bool) -> None:
    """Tokenize one block of records into `<prefix>.bin .idx`, and what was counted into `<prefix>.json`.

    Raises:
        UserError: a bad record, if `strict`.
    """
    texts, skipped = _texts(block, key, strict=strict)
    rows = [row for row in _encoded(texts, tokenizer) if len(row)]
    if len(rows) < len(texts):
        skipped["no tokens"] += len(texts) - len(rows)
    counts = {"documents": len(rows), "tokens": sum(map(len, rows)) + len(rows), "skipped": dict(skipped)}
    documents = (np.append(row, tokenizer.eod) for row in rows)
    write_documents(prefix, documents, token_dtype(tokenizer.vocab_size))
    write_atomically(prefix.with_suffix(".json"), lambda file: file.write(json.dumps(counts).encode()))


def merge_parts(parts: list[pathlib.Path], prefix: pathlib.Path, dtype: type[np.number]) -> None:
    """Put parts together, in order, as `<prefix>.bin .idx`."""
    with _building(prefix, dtype) as builder:
        for part in parts:
            builder.add_index(str(part))


def count_parts(parts: list[pathlib.Path]) -> dict[str, Any]:
    """What was counted in all parts: `documents`, `tokens`, `skipped` (reason -> records)."""
    documents, tokens, skipped = 0, 0, collections.Counter[str]()
    for part in parts:
        counts = json.loads(part.with_suffix(".json").read_text())
        documents, tokens = documents + counts["documents"], tokens + counts["tokens"]
        skipped.update(counts["skipped"])
    return {"documents": documents, "tokens": tokens, "skipped": dict(sorted(skipped.items()))}


def write_documents(prefix: pathlib.Path, documents: Iterable[np.ndarray], dtype: type[np.number]) -> None:
    """Write documents, one row of token ids each (empty ones keep their place), as `<prefix>.bin .idx`."""
    with _building(prefix, dtype) as builder:
        for document in documents:
            builder.add_document(document, [len(document)])


def check_token_ids(name: str, tokens: np.ndarray, vocab_size: int, max_windows: int = 64) -> None:
    """Look for ids outside the vocabulary in up to `max_windows` evenly spread windows of a million tokens.

    Raises:
        UserError: there is one; the tokenizer is not the one that made these tokens.
    """
    num_windows = min(max_windows, -(-len(tokens) // _WINDOW))
    for window in range(num_windows):
        begin = max(0, len(tokens) - _WINDOW) * window // max(1, num_windows - 1)
        ids = tokens[begin : begin + _WINDOW]
        worst = int(ids.max()) if ids.min() >= 0 else int(ids.min())
        if not 0 <= worst < vocab_size:
            raise UserError(
                f"--data-path corpus {name!r} holds token id {worst}, --tokenizer-model has {vocab_size} ids; "
                "give the tokenizer that made the corpus"
            )


def _texts(block: list[Record], key: str, *, strict: bool) -> tuple[list[str], collections.Counter]:
    texts: list[str] = []
    skipped: collections.Counter = collections.Counter()
    for record in block:
        try:
            texts.append(record.text(key))
        except BadRecord as reason:
            if strict:
                raise UserError(f"--strict: {record.where}: {reason}; repair it, or leave --strict out") from None
            skipped[str(reason)] += 1
    return texts, skipped


def _encoded(texts: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of each text; lists of Python's numbers, nine times as large, are held of one piece of text only."""
    rows = [np.array(row, np.int32) for row in tokenizer.encode([text for text in texts if len(text) <= PIECE])]
    long = {
        number: np.concatenate([np.array(tokenizer.encode([piece])[0], np.int32) for piece in pieces(text)])
        for number, text in enumerate(texts)
        if len(text) > PIECE
    }
    short = iter(rows)
    return [long[number] if number in long else next(short) for number in range(len(texts))]


@contextlib.contextmanager
def _building(prefix: pathlib.Path, dtype: type[np.number]) -> Iterator[Any]:
    """megatron-core's builder of `<prefix>.bin .idx`, writing under temporary names."""
    from megatron_retro.mcore import IndexedDatasetBuilder

    with replacing(pathlib.Path(f"{prefix}.bin")) as tokens:
        builder = IndexedDatasetBuilder(str(tokens), dtype=dtype)
        try:
            yield builder
        finally:
            builder.data_file.close()
        with replacing(pathlib.Path(f"{prefix}.idx")) as index:
            builder.finalize(str(index))
