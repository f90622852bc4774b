"""What retrieval is worth to a checkpoint: losses over the same tokens, leakage, answers to questions.

python tools/evaluate_retro.py --load DIR --retro-work-dir DIR --split valid --output eval.json --report eval.html
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from megatron_retro.config.evaluation import EvaluateConfig
from megatron_retro.config.flags import parse
from megatron_retro.errors import exit_on_user_error


def main() -> None:
    config = parse(EvaluateConfig, description=(__doc__ or "").splitlines()[0])
    from megatron_retro.evaluation.evaluate import evaluate  # after the flags are known to be right: it imports torch

    evaluate(config)


if __name__ == "__main__":
    exit_on_user_error(main)
