"""Tokenizes one document into `<prefix>.bin .idx .json`, in so much more address space than this process has.

Arguments: the tokenizer, the documents, the prefix, megabytes, characters that are encoded at once. Where that is too
little the exit code is 3, or C++ aborts.
"""

import os
import pathlib
import resource
import sys

from megatron_retro.data import tokenize, tokenizer
from megatron_retro.data.documents import Source

if __name__ == "__main__":
    model, documents, prefix, megabytes, piece = sys.argv[1:]
    opened = tokenizer.Tokenizer.open(model)
    records = list(Source.find(documents).records("text"))
    tokenizer.PIECE = tokenize.PIECE = int(piece)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (int(megabytes) << 20), resource.RLIM_INFINITY))
    try:
        tokenize.write_part(pathlib.Path(prefix), records, opened, "text", strict=True)
    except MemoryError:
        os._exit(3)
