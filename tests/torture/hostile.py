"""Hostile input: the fuzz tests of tests/test_hostile.py with more examples, each reader on files of any bytes."""

import pathlib

from torture import pytests
from torture.trials import Result


def campaign(folder: pathlib.Path, count: int, only: int | None = None) -> Result:
    """`count` files for each reader; there are no single trials, so `only` tells nothing apart."""
    tests, failures = pytests.run(folder, "tests/test_hostile.py", {"RETRO_FUZZ_EXAMPLES": str(count)})
    readers = [test for test in tests if "any_bytes_are_read_or_refused[" in test]
    return Result(
        "Whatever a file's bytes are, its reader counts and skips what is no good or ends in one line, in memory that "
        "does not grow with the file, and never runs code from it.",
        "Random bytes, spliced pieces and mutations of valid files (hypothesis) for every reader; documents of "
        "10 million tokens and endless lines under RLIMIT_AS; pickles, YAML tags, indices that point outside.",
        f"{len(readers)} readers × {count} files",
        failures,
    )
