"""A rank that meets the others again and again, far below a training program: quick to start.

watch_worker.py MINUTES [RANK]    rank RANK hangs in its sixth round
"""

import sys
import time

from megatron_retro import distributed, watch
from megatron_retro.errors import exit_on_user_error


def main() -> None:
    minutes, hangs = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else -1
    distributed.join("gloo", minutes)
    watch.expect_progress()
    for number in range(10**6):
        watch.at(f"round {number}")
        if number == 6 and distributed.rank() == hangs:
            with watch.doing("a nap"):
                time.sleep(1000)
        distributed.all_gather(number)
        print(f"round {number}", flush=True)
        time.sleep(0.05)


exit_on_user_error(main)
