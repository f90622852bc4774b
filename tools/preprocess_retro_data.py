#!/usr/bin/env python
"""Documents to a work dir: tokens, chunks, embeddings, index, and every chunk's neighbors.

python tools/preprocess_retro_data.py --input my_text_data.jsonl --retro-work-dir /path/to/retrieval_data
torchrun --nproc-per-node 8 tools/preprocess_retro_data.py …    the same, shared out to eight processes
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from megatron_retro.config.flags import parse
from megatron_retro.config.preprocessing import PreprocessConfig
from megatron_retro.errors import exit_on_user_error


def main() -> None:
    config = parse(PreprocessConfig, description="Build a RETRO work dir from documents.")
    from megatron_retro.retrieval.pipeline import preprocess

    preprocess(config)


if __name__ == "__main__":
    exit_on_user_error(main)
