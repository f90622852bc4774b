"""Reading files that anyone may have written: of bounded size, without running what is in them.

Whatever the bytes, a reader returns what it promises or raises a `UserError` that names the file.
"""

import json
import pathlib
from typing import Any

import numpy as np

from megatron_retro.errors import UserError

MAX_TEXT_BYTES = 1 << 28
WAY_OUT = "restore the file, or build a new work dir"


def read_text(what: str, path: pathlib.Path, encoding: str = "utf-8") -> str:
    """A text file, whole.

    Args:
        what: the flag and the path, for messages.

    Raises:
        UserError: it cannot be read, is no text, or has more than `MAX_TEXT_BYTES`.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
        text = raw.decode(encoding)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what} cannot be read ({reason}); give a file of {encoding.upper()} text") from None
    if len(raw) > MAX_TEXT_BYTES:
        raise UserError(f"{what} is longer than {MAX_TEXT_BYTES >> 20} MiB; divide it into several")
    return text


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or nested too deeply to be one of ours.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load_array(
    path: pathlib.Path, dtype: type[np.generic], shape: tuple[int | None, ...], *, way_out: str = WAY_OUT
) -> np.ndarray:
    """A `.npy` file, mapped into memory; None in `shape` stands for any length.

    Raises:
        UserError: it is missing, damaged, or holds another type or shape; never unpickled.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python literals: many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} cannot be read as an array ({reason}); {way_out}") from None
    found = (array.dtype, array.shape) if isinstance(array, np.ndarray) else ("an archive", ())
    fits = len(found[1]) == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, found[1], strict=True)
    )
    if found[0] != dtype or not fits:
        expected = " x ".join("any" if wanted is None else str(wanted) for wanted in shape)
        held = " x ".join(map(str, found[1]))
        raise UserError(f"{path} holds {found[0]} {held}, not {np.dtype(dtype)} {expected}; {way_out}")
    return array
