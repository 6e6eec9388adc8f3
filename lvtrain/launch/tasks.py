"""Running the tasks of an attempt with `srun`, from the batch script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import IO

from lvtrain.launch.chain import Chain

# what Slurm sends to the batch script when it ends a job; it signals the tasks itself
_SIGNALS = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


def srun_command(chain: Chain, phase: str, max_minutes: float | None) -> list[str]:
    """The `srun` command that starts all tasks of a phase.

    If one task fails, srun kills the others, which would wait for it in a collective.
    """
    site = chain.site
    # since Slurm 22.05 srun no longer inherits --cpus-per-task from sbatch
    cpus = [f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []
    shape = [f"--nodes={site.nodes}", f"--ntasks={site.ranks}", f"--ntasks-per-node={site.tasks}", *cpus]
    start = ["srun", "--kill-on-bad-exit=1", *shape, *site.words("srun"), *site.words("container")]
    return start + chain.task_command(phase, max_minutes)


def run_tasks(command: list[str], environment: dict[str, str], interrupted: Callable[[], None]) -> tuple[int, str]:
    """Runs srun to its end. Returns its exit code and its error messages.

    The batch script survives the signals that end a job, so that it can record what happened. `interrupted` is called
    once, soon after the first SIGTERM.
    """
    asked = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            asked.set()

    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    messages: list[str] = []
    try:
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
        assert child.stderr is not None
        listener = threading.Thread(target=_pass_on, args=(child.stderr, messages), daemon=True)
        listener.start()
        forwarded = False
        while True:
            try:
                code = child.wait(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if asked.is_set() and not forwarded:
                    forwarded = True
                    interrupted()
        listener.join(timeout=5)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code, "".join(messages)


def task_environment(master_address: str) -> dict[str, str]:
    """The tasks' environment: this one, and the address where the ranks meet."""
    return {**os.environ, "MASTER_ADDR": master_address, "PYTHONUNBUFFERED": "1"}


def _pass_on(stream: IO[str], messages: list[str]) -> None:
    for line in stream:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.startswith("srun: error:") and len(messages) < 1000:
            messages.append(line)
