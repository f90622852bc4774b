"""Stands for a SLURM cluster of two nodes, as far as the scripts in `examples/` can see: sbatch, srun and scontrol."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from launch import ROOT

# Runs the task once for each of two nodes, all on this machine, and notes the tasks' process ids.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=() code=0
for node in 0 1; do
    SLURM_NODEID=$node SLURMD_NODENAME=localhost "$@" &
    pids+=($!)
done
echo "${pids[@]}" > "$TEST_RESULTS/tasks"
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""

# Requeueing a job ends what still runs of it.
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; sleep 0.2; echo localhost; exit; fi
echo "$@" >> "$TEST_RESULTS/scontrol"
for pid in $(< "$TEST_RESULTS/tasks"); do
    while kill "$pid" 2> /dev/null; do sleep 0.2; done
done
touch "$TEST_RESULTS/queue"
"""

# Runs the job's script at once, in place of queueing it; and again whenever it was requeued.
SBATCH = """#!/bin/bash
export SLURM_RESTART_COUNT=-1
touch "$TEST_RESULTS/queue"
while rm "$TEST_RESULTS/queue" 2> /dev/null; do
    ((SLURM_RESTART_COUNT += 1))
    bash "$@" &
    echo $! > "$TEST_RESULTS/job"
    code=0
    wait $! || code=$?
done
exit $code
"""


class Cluster:
    """Two nodes, both this machine.

    Args:
        folder: empty; the cluster's own.
        submit_dir: the repository, where jobs start.
        work: RETRO_WORK_DIR of the jobs.

    Attributes:
        results: what the jobs' processes may write to, as TEST_RESULTS.
        save: SAVE_DIR of the jobs.
    """

    def __init__(self, folder: pathlib.Path, submit_dir: pathlib.Path, work: pathlib.Path):
        self.results, self.save = folder / "results", folder / "save"
        for directory in (self.results, folder / "bin"):
            directory.mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "RETRO_WORK_DIR": str(work),
            "SAVE_DIR": str(self.save),
            "SLURM_JOB_END_TIME": str(int(time.time()) + 3600),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": "2",
            "SLURM_SUBMIT_DIR": str(submit_dir),
            "TEST_RESULTS": str(self.results),
        }
        self.job: subprocess.Popen | None = None

    def sbatch(self, script: str, *arguments: str) -> None:
        command = ["sbatch", str(ROOT / "examples" / script), *arguments]
        self.job = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def finish(self) -> tuple[int, str]:
        assert self.job
        output, _ = self.job.communicate(timeout=150)
        return self.job.returncode, output

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """While the job runs."""
        deadline = time.monotonic() + 150
        while not is_so():
            assert self.job and self.job.poll() is None, self.job.communicate()[0]
            assert time.monotonic() < deadline, "it does not come to that"
            time.sleep(0.1)

    def tasks(self) -> list[int]:
        """Process ids of what srun started."""
        return [int(word) for word in (self.results / "tasks").read_text().split()]

    def signal_job(self, number: signal.Signals) -> None:
        """To the job's script, as `sbatch --signal=B:…` does."""
        os.kill(int((self.results / "job").read_text()), number)

    def times_requeued(self) -> int:
        file = self.results / "scontrol"
        lines = file.read_text().splitlines() if file.exists() else []
        assert set(lines) <= {f"requeue {self.environment['SLURM_JOB_ID']}"}
        return len(lines)

    def kill_leftovers(self) -> None:
        """End what a failed test may have left: the torchruns end their workers at SIGTERM."""
        for task in self.tasks() if (self.results / "tasks").exists() else []:
            for pid in [*children(task), task]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        if self.job and self.job.poll() is None:
            self.job.kill()


def children(pid: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]
