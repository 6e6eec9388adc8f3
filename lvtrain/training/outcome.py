"""`outcome.json`: how a start of a run ended, for the chain of jobs that decides what comes next.

| outcome | meaning |
|---|---|
| `done` | the run, or the one phase asked for, is complete |
| `requeue` | stopped on request with a checkpoint; the next start resumes |
| `fatal` | an error that another start would only repeat |
| no file | the start crashed (the chain removes the last file before each start) |

This file needs only the standard library to be imported, because the batch script reads outcomes outside the container.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from lvtrain.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED
from lvtrain.files import atomic
from lvtrain.files.patience import patiently
from lvtrain.files.reading import parse_json

Verdict = Literal["done", "requeue", "fatal"]


@dataclass(frozen=True)
class Outcome:
    """How start number `attempt` ended: in which phase (None: the whole run), at which step, and why."""

    outcome: Verdict
    phase: str | None
    step: int
    reason: str
    attempt: int

    @property
    def exit_code(self) -> int:
        return {"done": EXIT_DONE, "requeue": EXIT_STOPPED, "fatal": EXIT_ERROR}[self.outcome]


def path_in(run_folder: Path) -> Path:
    """The file that holds the outcome of a run."""
    return Path(run_folder) / "outcome.json"


def write(run_folder: Path, outcome: Outcome) -> None:
    """Replaces `outcome.json`. Several ranks may call it at once: any rank reports the fatal error that it met."""
    atomic.write_json(path_in(run_folder), asdict(outcome), writer=f"{socket.gethostname()}.{os.getpid()}")


def read(run_folder: Path) -> Outcome | None:
    """The last outcome; None if there is no file, or it is not one of ours."""
    try:
        values = parse_json(patiently(path_in(run_folder).read_text))
        verdict, phase, reason = values["outcome"], values["phase"], str(values["reason"])
        found = Outcome(verdict, phase, int(values["step"]), reason, int(values["attempt"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.outcome in get_args(Verdict) else None


def committed_step(run_folder: Path) -> int:
    """The step of the newest committed checkpoint, 0 if there is none: the measure of a run's progress."""
    folder = Path(run_folder) / "checkpoints"
    try:
        names = patiently(os.listdir, folder)  # not glob: it takes a folder that cannot be read for empty
    except FileNotFoundError:
        return 0
    found = (re.fullmatch(r"step_(\d+)", name) for name in names if patiently((folder / name / "manifest.json").exists))
    return max((int(match[1]) for match in found if match), default=0)
