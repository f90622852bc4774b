"""Train RETRO, or with no --retro-add-retriever the GPT baseline, on a work dir.

python pretrain_retro.py --retro-work-dir DIR --retro-add-retriever …
torchrun --nproc-per-node N pretrain_retro.py …
WORLD_SIZE=N python pretrain_retro.py … --dry-run
"""

import time
from typing import Any

from megatron_retro.config.flags import parse
from megatron_retro.config.training import PretrainConfig
from megatron_retro.distributed import world_size
from megatron_retro.errors import exit_on_user_error


def main() -> None:
    started = time.monotonic()
    source: Any = None

    def with_shape(given: dict[str, Any]) -> dict[str, Any]:
        """The flags of the model to start from, where one is named; of the checkpoint, where the run goes on."""
        nonlocal source
        if not given.get("retro_fit_from"):
            return given
        from megatron_retro.interop.source import is_own_checkpoint, open_source
        from megatron_retro.training.fit import adopt

        flag, directory = "--retro-fit-from", given["retro_fit_from"]
        if given.get("load") and is_own_checkpoint(given["load"]):
            flag, directory = "--load", given["load"]
        source = open_source(flag, directory, given.get("trust_pickle", False))
        return adopt(given, source, flag)

    config = parse(PretrainConfig, description=(__doc__ or "").splitlines()[0], complete=with_shape)
    # What needs torch is imported when the flags are known to be right.
    if config.run.dry_run:
        ranks = world_size(otherwise=config.parallel.ranks_of_a_model)
        config.finish(ranks)
        from megatron_retro.training.dry_run import dry_run

        return dry_run(config, ranks, source)
    config.finish(world_size())
    from megatron_retro.training.loop import train

    train(config, started, source)


if __name__ == "__main__":
    exit_on_user_error(main)
