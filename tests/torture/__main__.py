"""All campaigns, or those that are named, and the table of what they found.

PYTHONPATH=.:tests python -m torture [CAMPAIGN[:NUMBER] …] [--count N] [--output TABLE.md]
"""

import argparse
import datetime
import importlib
import os
import pathlib
import platform
import sys
import tempfile
import time

from torture.trials import Result, say

# Campaign -> how many trials; each is a module here with `campaign(folder, count, only) -> Result`.
CAMPAIGNS = {
    "preprocessing": 170,
    "training": 64,
    "layouts": 100,
    "corruption": 1000,
    "room": 96,
    "deaths": 72,
    "slurm": 2,
    "hostile": 300,
    "steps": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "campaigns", nargs="*", default=list(CAMPAIGNS), help=f"{', '.join(CAMPAIGNS)}; :NUMBER, one trial"
    )
    parser.add_argument("--count", type=int, help="trials of each campaign, instead of its own number")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("build/reliability.md"))
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for campaign in given.campaigns:
            name, _, number = campaign.partition(":")
            run = importlib.import_module(f"torture.{name}").campaign
            place, start = pathlib.Path(folder) / name, time.monotonic()
            place.mkdir()
            results.append(run(place, given.count or CAMPAIGNS[name], int(number) if number else None))
            say(f"{name}: {results[-1].count}, {len(results[-1].failures)} lost, {time.monotonic() - start:.0f} s")
    table = "\n".join(lines(results))
    print(table)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(table + "\n", encoding="utf-8")
    sys.exit(any(result.failures for result in results))


def lines(results: list[Result]) -> list[str]:
    """The table, and where and when it was made."""
    rows = ["| promise | how tested | count | result |", "|---|---|---|---|"]
    for result in results:
        outcome = f"**{len(result.failures)} lost**" if result.failures else "nothing lost"
        found = f"; {result.found}" if result.found else ""
        rows.append(f"| {result.promise} | {result.how} | {result.count} | {outcome}{found} |")
    where = f"{os.cpu_count()} cores ({platform.machine()}), {datetime.date.today():%d %B %Y}"
    return [*rows, "", f"Measured by `make torture` on {where}."]


if __name__ == "__main__":
    main()
