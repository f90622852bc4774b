"""EleutherAI's lm-evaluation-harness with the model "retro"; every flag is the harness's own.

python tools/lm_eval_retro.py --model retro --model_args load=DIR,retro_work_dir=DIR,retrieval=on --tasks lambada_openai
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from megatron_retro.errors import exit_on_user_error


def main() -> None:
    from megatron_retro.evaluation.harness import register

    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    exit_on_user_error(main)
