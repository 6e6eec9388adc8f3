"""Slurm's commands, as few as the chain needs; every call goes through one function that tests replace."""

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
    """A job as `scontrol show job` tells it; `end` is when its time limit strikes (seconds since 1970)."""

    state: str
    reason: str
    end: float | None


@dataclass(frozen=True)
class Queued:
    """A job as squeue tells it."""

    job: int
    state: str
    reason: str
    nodes: str


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Without the variables of the job we are in: sbatch would take them for options of the job it submits."""
    return {name: value for name, value in environment.items() if name == "SLURM_CONF" or not name.startswith("SLURM")}


def run_command(command: list[str], *, pause: Callable[[float], None] = time.sleep) -> subprocess.CompletedProcess[str]:
    """Runs it, again for a minute while the controller does not answer: a busy controller must not end a chain.

    A submission whose answer was lost may have been accepted, so it is repeated only if no controller was reached.
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
    def __init__(self, run: Run = run_command) -> None:
        self.run = run

    def submit(self, script: Path, *options: str) -> int:
        """The new job's id. Raises UserError with sbatch's own words when it is refused."""
        done = self.run(["sbatch", "--parsable", *options, str(script)])
        match = re.match(r"(\d+)", done.stdout)
        if done.returncode or not match:
            raise UserError(f"sbatch refused {script}: {_last_line(done.stderr)}; see slurm/site.env")
        return int(match[1])

    def requeue(self, job: int) -> str | None:
        """None if the job will start again, else why not."""
        done = self.run(["scontrol", "requeue", str(job)])
        return _last_line(done.stderr) if done.returncode else None

    def cancel(self, jobs: list[int]) -> None:
        if jobs:
            self.run(["scancel", *map(str, jobs)])

    def postpone(self, job: int, seconds: int, exclude: tuple[str, ...]) -> None:
        """A pending job starts no earlier than in so many seconds, and not on these nodes."""
        nodes = [f"ExcNodeList={','.join(exclude)}"] if exclude else []
        self.run(["scontrol", "update", f"JobId={job}", f"StartTime=now+{seconds}", *nodes])

    def job(self, job: int) -> Job:
        """Raises UserError when Slurm does not know the job (any more)."""
        done = self.run(["scontrol", "show", "job", "--oneliner", str(job)])
        fields = dict(re.findall(r"(\w+)=(\S*)", done.stdout))
        if done.returncode or "JobState" not in fields:
            raise UserError(f"scontrol does not know job {job}: {_last_line(done.stderr)}")
        return Job(fields["JobState"], fields.get("Reason", "None"), _seconds(fields.get("EndTime", "Unknown")))

    def queue(self, job_name: str) -> list[Queued]:
        """This user's jobs of that name that have not ended. Raises UserError when Slurm does not answer."""
        done = self.run(["squeue", "--noheader", "--me", f"--name={job_name}", "--format=%i|%T|%r|%N"])
        if done.returncode:
            raise UserError(f"squeue failed: {_last_line(done.stderr)}")
        rows = [line.strip().split("|") for line in done.stdout.splitlines() if line.count("|") == 3]
        return [Queued(int(job), state, reason, nodes) for job, state, reason, nodes in rows if job.isdigit()]

    def first_address(self, nodelist: str) -> str:
        """The address of a node list's first node, as Slurm itself would reach it."""
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
