"""A Slurm of our own on loopback for the tests, and chains in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lvtrain.launch.chain import load_chain
from lvtrain.launch.ledger import Ledger

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 1500.0  # seconds; a chain is over in three minutes on a free machine
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


@contextmanager
def sandbox(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the environment in which sbatch, squeue and so on talk to it; skips, with the reason, where it cannot run."""
    missing = [
        program for program in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(program, path=PATH)
    ]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing (apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("the Slurm sandbox is only tried as root")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "LVTRAIN"))
    }
    environment.update(LVTRAIN_SANDBOX=str(folder), PATH=PATH)
    script = ROOT / "tools" / "slurm_sandbox.sh"
    # takes the daemons and jobs down when this process closes the pipe, or is gone, however that happened
    guard = subprocess.Popen(
        ["bash", "-c", 'read; exec bash "$0" down', str(script)],
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert guard.stdin is not None
    try:
        up = subprocess.run(["bash", str(script), "up"], env=environment, capture_output=True, text=True, timeout=300)
        assert up.returncode == 0, up.stderr
        yield {**environment, "SLURM_CONF": up.stdout.strip().partition("=")[2]}
    finally:
        guard.stdin.close()
        guard.wait(timeout=120)
        assert not folder.exists()


class ChainRun:
    """A submitted chain, watched through its run folder and Slurm's commands; it must be over in `PATIENCE` seconds."""

    def __init__(self, environment: dict[str, str], run_folder: Path) -> None:
        self.environment, self.run_folder = environment, run_folder
        self.deadline = time.monotonic() + PATIENCE

    def command(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, cwd=ROOT, timeout=180)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def ledger(self, event: str | None = None) -> list[dict[str, Any]]:
        records = Ledger(self.run_folder / "slurm").read()
        return [record for record in records if event in (None, record["event"])]

    def states(self) -> dict[int, str]:
        """Of this chain's jobs that are in the queue."""
        rows = self.command(
            "squeue", "--noheader", f"--name={load_chain(self.run_folder).job_name}", "--format=%i %T"
        ).splitlines()
        return {int(job): state for job, state in map(str.split, rows)}

    def step(self) -> int:
        found = self.run_folder.glob("checkpoints/step_*/manifest.json")
        return max((int(path.parent.name.removeprefix("step_")) for path in found), default=0)

    def running_job(self, phase: str, *, past_step: int) -> int:
        """Waits until the phase runs and has committed a checkpoint past this step; returns its job."""

        def found() -> bool:
            assert not (self.run_folder / "slurm" / "stopped.json").exists(), self.story()
            starts = [record for record in self.ledger("start") if record["phase"] == phase]
            return bool(starts) and self.step() > past_step and self.states().get(starts[-1]["job"]) == "RUNNING"

        self.wait(found, f"phase {phase} past step {past_step}")
        return int([record for record in self.ledger("start") if record["phase"] == phase][-1]["job"])

    def reach_time_limit(self, job: int) -> None:
        """Its time is up in a moment; Slurm looks at that twice a minute."""
        self.command("scontrol", "update", f"JobId={job}", "EndTime=now+3")

    def wait_until_struck(self, job: int) -> None:
        """Waits until no task of the job's present attempt is left."""

        def struck() -> bool:
            ended = any(record["job"] == job for record in self.ledger("end"))
            return ended or self.states().get(job) not in ("RUNNING", "COMPLETING")

        self.wait(struck, f"the end of job {job}")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            assert time.monotonic() < self.deadline, (
                f"{self.run_folder.name}: waited in vain for {what}\n{self.story()}"
            )
            time.sleep(0.5)

    def wait_until_over(self) -> None:
        self.wait(lambda: bool(self.ledger()) and not self.states(), "the end of the chain")

    def story(self) -> str:
        logs = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.run_folder.glob("slurm/*.log"))]
        return "\n".join([*map(json.dumps, self.ledger()), str(self.states()), *logs])


SMALL = {"nodes": "2", "gpus_per_node": "0", "time": "50", "signal_seconds": "20", "hold_seconds": "1"}


def submit(environment: dict[str, str], recipe: Path, run_folder: Path, *words: str, **settings: str) -> ChainRun:
    """Submits a chain of the trainer in miniature over 2 nodes x 1 task, from "a login node".

    Settings in small letters are LVTRAIN_ variables, others are variables as they stand.
    """
    chain = ChainRun(with_settings(environment, settings), run_folder)
    module = [sys.executable, "-m", "lvtrain.launch", "submit", "--main", "tests/slurm_standin.py"]
    chain.command(*module, "--recipe", str(recipe), "--ds_config", "ds_configs/zero2.json", *words)
    return chain


def with_settings(environment: dict[str, str], settings: dict[str, str]) -> dict[str, str]:
    python = {"python": sys.executable, "launch_python": sys.executable}
    variables = {
        f"LVTRAIN_{name.upper()}": value for name, value in {**SMALL, **python, **settings}.items() if name.islower()
    }
    return {**environment, **variables, **{name: value for name, value in settings.items() if name.isupper()}}


def sbatch_quickstart(environment: dict[str, str], run_folder: Path, overrides: list[str], **settings: str) -> ChainRun:
    """`sbatch slurm/quickstart.sh`, as a user would; the small job it starts submits the chain."""
    chain = ChainRun(with_settings(environment, settings), run_folder)
    words = [f"name={run_folder.name}", f"runs={run_folder.parent}", *overrides]
    job = chain.command("sbatch", "--parsable", "slurm/quickstart.sh", *words).strip()
    log = ROOT / "slurm" / "logs" / f"quickstart-submit-{job}.log"
    chain.wait(lambda: bool(chain.ledger("submit")), f"job {job} to submit the chain: {log}")
    chain.wait(lambda: str(run_folder) in log.read_text(), f"the submission's own words in {log}")
    log.unlink()
    return chain
