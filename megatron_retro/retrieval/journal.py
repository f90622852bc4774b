"""The journal of a live database: one JSON line a change, so that a restart has every document again.

    {"change": "add", "document": "notes:0", "text": "…"}
    {"change": "remove", "document": "my_text_data:17"}

Its additions are documents as preprocessing reads them (`--input notes.jsonl`, key `text`), numbered alike.
"""

import fcntl
import json
import os
import pathlib
from typing import Any

from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json


class Journal:
    """A journal that is open for one process.

    Attributes:
        name: of the corpus that added documents form: the file's, without `.jsonl`.
        changes: what it held when it was opened, oldest first.

    Raises:
        UserError: it is no journal, cannot be written to, or another process has it open.
    """

    def __init__(self, path: str):
        self._path = pathlib.Path(path)
        if self._path.suffix != ".jsonl" or not self._path.stem:
            raise UserError(f"--journal is {path}; it takes a file whose name ends in .jsonl")
        self.name = self._path.stem
        try:
            self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 - open as long as this object is
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--journal {path} is open in another process; give each its own") from None
        except OSError as error:
            raise UserError(f"--journal {path} cannot be written to ({error.strerror}); give another file") from None
        self.changes = self._read()

    def _read(self) -> list[dict[str, Any]]:
        """All changes; a last line that a crash has cut was never acknowledged, and is cut off."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        return [self._change(number, line) for number, line in enumerate(content[:whole].splitlines(), 1)]

    def _change(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            change = parse_json(line)
            wanted = {"add": {"change", "document", "text"}, "remove": {"change", "document"}}[change["change"]]
            assert set(change) == wanted and all(isinstance(value, str) for value in change.values())
            "".join(change.values()).encode()  # a ValueError where it holds what is no Unicode text
        except (ValueError, KeyError, TypeError, AssertionError):
            raise UserError(
                f"--journal {self._path}:{number} is no change of a database; give a journal that tools/serve_retro.py "
                "wrote, or a new file"
            ) from None
        return change

    def append(self, changes: list[dict[str, str]]) -> None:
        """Write changes, all of them or none; they are on the disk when this returns.

        Raises:
            OSError: they could not be written.
        """
        end = os.fstat(self._file.fileno()).st_size
        lines = "".join(json.dumps(change) + "\n" for change in changes).encode()
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def close(self) -> None:
        self._file.close()
