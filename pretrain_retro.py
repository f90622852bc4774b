"""Train RETRO, or with no --retro-add-retriever the GPT baseline, on a work dir.

python pretrain_retro.py --retro-work-dir DIR --retro-add-retriever …
torchrun --nproc-per-node N pretrain_retro.py …
"""

from megatron_retro.config.flags import parse
from megatron_retro.config.training import PretrainConfig
from megatron_retro.distributed import world_size
from megatron_retro.errors import exit_on_user_error


def main() -> None:
    config = parse(PretrainConfig, description=(__doc__ or "").splitlines()[0])
    config.finish(world_size())
    from megatron_retro.training.loop import train  # after the flags are known to be right: it imports torch

    train(config)


if __name__ == "__main__":
    exit_on_user_error(main)
