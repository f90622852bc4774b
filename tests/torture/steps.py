"""Bad numbers and requests to stop: tests/test_bad_steps.py."""

import pathlib

from torture import pytests
from torture.trials import Result


def campaign(folder: pathlib.Path, count: int, only: int | None = None) -> Result:
    """There is one run of them, whatever `count` and `only` say."""
    tests, failures = pytests.run(folder, "tests/test_bad_steps.py")
    return Result(
        "A NaN or Inf on one rank, or a loss spike, updates no weights on any rank and gets into no checkpoint; what "
        "it read is written down. Asked to stop, all ranks save and end after the same step.",
        "NaN in a loss, a gradient and a moment of Adam on one of two ranks, a spike, each policy, fp32 and bf16 with "
        "the distributed optimizer, weights compared to the bit; SIGTERM, SIGINT, SIGUSR1, SIGUSR2, a STOP file, a "
        "time limit.",
        f"{len(tests)} tests",
        failures,
    )
