"""Megatron-LM's files as its own tools lay them out, written byte by byte: corpora, and RETRO projects of 0.15."""

import json
import pathlib
import struct

import h5py
import numpy as np

DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def write_corpus(prefix, documents, code=8):
    """`<prefix>.bin .idx`; a document is a list of sequences, a sequence a list of ids; `code` is the type's number."""
    prefix = pathlib.Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    rows = [sequence for document in documents for sequence in document]
    size = np.dtype(DTYPES[code]).itemsize
    pathlib.Path(f"{prefix}.bin").write_bytes(b"".join(np.array(row, DTYPES[code]).tobytes() for row in rows))
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    first, at = [0], 0
    for document in documents:
        first.append(first[-1] + len(document))
    positions = []
    for row in rows:
        positions.append(at)
        at += size * len(row)
    pathlib.Path(f"{prefix}.idx").write_bytes(
        header
        + struct.pack("<QQ", len(rows), len(first))
        + struct.pack(f"<{len(rows)}i", *map(len, rows))
        + struct.pack(f"<{len(rows)}q", *positions)
        + struct.pack(f"<{len(first)}q", *first)
    )
    return str(prefix)


def database(corpora, chunk_length, eod):
    """Megatron's `chunks` [n, 5] over corpora of documents: each sequence without its last eod, cut into C tokens.

    Chunks without BERT tokens are left out: here those whose ids are all below 3.
    """
    rows = []
    for number, documents in enumerate(corpora):
        sequences = [sequence for document in documents for sequence in document]
        for place, sequence in enumerate(sequences):
            length = len(sequence) - (sequence[-1] == eod)
            for begin in range(0, length, chunk_length):
                end = min(length, begin + chunk_length)
                if max(sequence[begin:end]) >= 3:
                    rows.append((number, place, begin, end, end - begin))
    return np.array(rows, np.uint32)


def write_blocks(directory, name, rows, size):
    """Rows in files of `size`, named as Megatron does."""
    directory.mkdir(parents=True, exist_ok=True)
    digits = int(np.ceil(np.log(len(rows)) / np.log(10)) + 1)
    for begin in range(0, len(rows), size):
        end = min(begin + size, len(rows))
        with h5py.File(directory / f"{begin:0{digits}d}-{end:0{digits}d}.hdf5", "w") as file:
            file[name] = rows[begin:end]


def write_project(path, config, corpora, chunks, neighbors, block_size=50):
    """`config.json`, `db/` and `query/`; `neighbors` is split -> [windows, K]."""
    directories = {split: f"{split}_{number:032x}" for number, split in enumerate(neighbors)}
    for split, rows in neighbors.items():
        write_blocks(path / "query" / directories[split], "neighbors", rows, block_size)
    values = {**config, "retro_block_size": block_size, "retro_bert_vocab_file": "tokenizer/bert-vocab.txt"}
    values["retro_neighbor_dirs"] = {split: directories.get(split) for split in ("train", "valid", "test")}
    (path / "config.json").write_text(json.dumps(values, indent=4, sort_keys=True))
    blend = zip(values["retro_gpt_data_path"][::2], values["retro_gpt_data_path"][1::2], corpora, strict=True)
    infos = [{"prefix": prefix, "ratio": float(weight), "n_docs": len(rows)} for weight, prefix, rows in blend]
    (path / "db" / "merged").mkdir(parents=True)
    (path / "db" / "indexed_dataset_infos.json").write_text(json.dumps(infos))
    with h5py.File(path / "db" / "merged" / "train.hdf5", "w") as file:
        file["chunks"] = chunks
        file["n_written"] = np.array([len(chunks)], np.uint64)
    return path
