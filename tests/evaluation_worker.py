"""Started by test_evaluation.py: evaluates on two ranks at one layout after the other, all forked from this process.

evaluation_worker.py DIRECTORY [flags of tools/evaluate_retro.py]   writes DIRECTORY/<layout>.json
"""

import multiprocessing
import os
import socket
import sys

from megatron_retro.config.evaluation import EvaluateConfig
from megatron_retro.config.flags import parse
from megatron_retro.errors import exit_on_user_error
from megatron_retro.evaluation.evaluate import evaluate

RANKS = 2
LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", "2"],
    "pipeline": ["--pipeline-model-parallel-size", "2"],
    "data": [],
}


def be_rank(rank: int, port: int, arguments: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port), "MASTER_ADDR": "localhost"}
    exit_on_user_error(lambda: evaluate(parse(EvaluateConfig, arguments)) and None)


def main() -> None:
    directory, *flags = sys.argv[1:]
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    for name, layout in LAYOUTS.items():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        arguments = [*flags, *layout, "--output", f"{directory}/{name}.json"]
        forks = multiprocessing.get_context("fork")
        ranks = [forks.Process(target=be_rank, args=(rank, port, arguments), daemon=True) for rank in range(RANKS)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            sys.exit(f"{name} parallel: exit codes {[rank.exitcode for rank in ranks]}")


if __name__ == "__main__":
    main()
