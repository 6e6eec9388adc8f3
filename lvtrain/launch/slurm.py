"""The commands of Slurm that a chain needs. Every call goes through one function, which tests replace."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lvtrain.errors import UserError

_NOT_REACHED = re.compile("Unable to contact slurm controller|Connection refused")
_NO_ANSWER = re.compile(_NOT_REACHED.pattern + "|Socket timed out|Transport endpoint is not connected")
Run = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Job:
    """A job as `scontrol show job` describes it. `end` is its time limit, in seconds since 1970."""

    state: str
    reason: str
    end: float | None


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue, as `squeue` lists it."""

    job: int
    state: str
    reason: str
    nodes: str


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without the variables of the current job: sbatch would apply them to the job that it submits."""
    return {name: value for name, value in environment.items() if name == "SLURM_CONF" or not name.startswith("SLURM")}


def run_command(command: list[str], *, pause: Callable[[float], None] = time.sleep) -> subprocess.CompletedProcess[str]:
    """Runs a command, and again for a minute while the controller does not answer. A busy controller must not end a chain.

    A submission may have been accepted even if its answer was lost. So it is repeated only if no controller was reached.

    Raises:
        UserError: the command does not exist here.
    """
    environment = clean_environment() if command[0] == "sbatch" else None
    away = _NOT_REACHED if command[0] == "sbatch" else _NO_ANSWER
    waits = iter((5, 10, 15, 30))
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        except FileNotFoundError as error:
            raise UserError(
                f"{command[0]} is not on this machine's PATH; submit from a login node of the cluster"
            ) from error
        wait = next(waits, None)
        if done.returncode == 0 or wait is None or not away.search(done.stderr):
            return done
        pause(wait)


class Slurm:
    """Submits, requeues, cancels and lists jobs."""

    def __init__(self, run: Run = run_command) -> None:
        self.run = run

    def submit(self, script: Path, *options: str) -> int:
        """Submits a script. Returns the new job's id.

        Raises:
            UserError: sbatch refused it; the line quotes why.
        """
        done = self.run(["sbatch", "--parsable", *options, str(script)])
        match = re.match(r"(\d+)", done.stdout)
        if done.returncode or not match:
            raise UserError(f"sbatch refused {script}: {_last_line(done.stderr)}; see slurm/site.env")
        return int(match[1])

    def requeue(self, job: int) -> str | None:
        """Requeues a job. Returns None if it will start again, else why not."""
        done = self.run(["scontrol", "requeue", str(job)])
        return _last_line(done.stderr) if done.returncode else None

    def cancel(self, jobs: list[int]) -> None:
        if jobs:
            self.run(["scancel", *map(str, jobs)])

    def postpone(self, job: int, seconds: int, exclude: tuple[str, ...]) -> None:
        """Makes a pending job start in `seconds` at the earliest, and not on the nodes in `exclude`."""
        nodes = [f"ExcNodeList={','.join(exclude)}"] if exclude else []
        self.run(["scontrol", "update", f"JobId={job}", f"StartTime=now+{seconds}", *nodes])

    def job(self, job: int) -> Job:
        """State, reason and time limit of a job.

        Raises:
            UserError: Slurm does not know the job, or no longer.
        """
        done = self.run(["scontrol", "show", "job", "--oneliner", str(job)])
        fields = dict(re.findall(r"(\w+)=(\S*)", done.stdout))
        if done.returncode or "JobState" not in fields:
            raise UserError(f"scontrol does not know job {job}: {_last_line(done.stderr)}")
        return Job(fields["JobState"], fields.get("Reason", "None"), _seconds(fields.get("EndTime", "Unknown")))

    def queue(self, job_name: str) -> list[QueuedJob]:
        """This user's jobs of that name that have not ended.

        Raises:
            UserError: Slurm does not answer.
        """
        done = self.run(["squeue", "--noheader", "--me", f"--name={job_name}", "--format=%i|%T|%r|%N"])
        if done.returncode:
            raise UserError(f"squeue failed: {_last_line(done.stderr)}; run this on a login node of the cluster")
        rows = [line.strip().split("|") for line in done.stdout.splitlines() if line.count("|") == 3]
        return [QueuedJob(int(job), state, reason, nodes) for job, state, reason, nodes in rows if job.isdigit()]

    def first_address(self, nodelist: str) -> str:
        """The address of the first node of a node list, as Slurm reaches it.

        Raises:
            UserError: Slurm cannot read the list.
        """
        names = self.run(["scontrol", "show", "hostnames", nodelist]).stdout.split()
        if not names:
            raise UserError(f"scontrol cannot read the node list {nodelist!r}")
        shown = self.run(["scontrol", "show", "node", "--oneliner", names[0]]).stdout
        match = re.search(r"\bNodeAddr=(\S+)", shown)
        return match[1] if match else names[0]


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason given"
