"""`outcome.json`: how an attempt at a run ended, in the words the chain of jobs acts on.

`done`: the phase (or the run) is complete. `requeue`: stopped early on request with a checkpoint, start me again.
`fatal`: an error that starting again would only repeat. No file: the attempt crashed (the chain sets the last one
aside before it starts the next). Only the standard library is needed to read it, because the batch script does so
outside the container the training runs in.
"""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from lvtrain.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED

Verdict = Literal["done", "requeue", "fatal"]


@dataclass(frozen=True)
class Outcome:
    """How attempt number `attempt` ended: in which phase (None: the whole run), at which step, and why."""

    outcome: Verdict
    phase: str | None
    step: int
    reason: str
    attempt: int

    @property
    def exit_code(self) -> int:
        return {"done": EXIT_DONE, "requeue": EXIT_STOPPED, "fatal": EXIT_ERROR}[self.outcome]


def path_in(run_folder: Path) -> Path:
    return Path(run_folder) / "outcome.json"


def write(run_folder: Path, outcome: Outcome) -> None:
    """Replaces `outcome.json` by one atomic rename, after the last checkpoint is committed and all ranks agree on it.

    A fatal error may be written by whichever rank met it, because the others may be waiting in a collective.
    """
    target = path_in(run_folder)
    beside = target.with_name(f".outcome.json.{socket.gethostname()}.{os.getpid()}")
    with beside.open("w") as file:
        json.dump(asdict(outcome), file)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(target)


def read(run_folder: Path) -> Outcome | None:
    """The last outcome, or None if there is none that can be read (a foreign file says nothing)."""
    try:
        values = json.loads(path_in(run_folder).read_text())
        verdict, phase, reason = values["outcome"], values["phase"], str(values["reason"])
        found = Outcome(verdict, phase, int(values["step"]), reason, int(values["attempt"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.outcome in get_args(Verdict) else None


def committed_step(run_folder: Path) -> int:
    """The step of the newest committed checkpoint, 0 if there is none: the measure of a run's progress."""
    found = (
        re.fullmatch(r"step_(\d+)", path.parent.name) for path in Path(run_folder).glob("checkpoints/*/manifest.json")
    )
    return max((int(match[1]) for match in found if match), default=0)
