"""What to do after an attempt: a pure function of how it ended. No clock, no commands, no files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from lvtrain.errors import EXIT_ERROR
from lvtrain.training.outcome import Outcome

MAX_FRUITLESS = 3


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended, as the batch script sees it."""

    phase: str
    phase_done: bool
    outcome: Outcome | None  # None: it crashed
    exit_code: int  # srun's
    step_before: int
    step_after: int
    fruitless: int  # attempts at this phase without progress, this one included
    first_hold_seconds: int = 60
    suspects: tuple[str | None, ...] = ()  # the node blamed for each attempt so far, this one last


@dataclass(frozen=True)
class Finish:
    """The phase is done."""

    kind: ClassVar[str] = "finished"
    reason: str


@dataclass(frozen=True)
class Retry:
    """Try the phase again: after `hold_seconds`, without the nodes in `exclude`."""

    kind: ClassVar[str] = "again"
    reason: str
    hold_seconds: int = 0
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stop:
    """Do not try again: a person must fix something first."""

    kind: ClassVar[str] = "stop"
    reason: str


Decision = Finish | Retry | Stop


def decide(ended: AttemptResult) -> Decision:
    """What happens after an attempt.

    - The phase is done: finish.
    - An error: stop.
    - Stopped on request, or crashed: try again, unless three attempts made no progress.
    """
    if ended.phase_done:
        return Finish(f"phase {ended.phase} is done at step {ended.step_after}")
    if ended.outcome is not None and ended.outcome.outcome == "fatal":
        return Stop(f"error in phase {ended.phase} at step {ended.outcome.step}: {ended.outcome.reason}")
    if ended.outcome is None and ended.exit_code == EXIT_ERROR:
        return Stop(
            f"phase {ended.phase} was refused at the start (exit code {EXIT_ERROR}); its reason is the log's last line"
        )
    how = (
        f"crashed (exit code {ended.exit_code})" if ended.outcome is None else f"stopped early ({ended.outcome.reason})"
    )
    if ended.fruitless >= MAX_FRUITLESS:
        return Stop(
            f"{ended.fruitless} attempts at phase {ended.phase} made no progress past step {ended.step_after}; the last {how}"
        )
    if ended.outcome is not None or ended.step_after > ended.step_before:
        return Retry(f"{how} at step {ended.step_after}")
    return Retry(
        f"{how} without progress past step {ended.step_after}",
        hold_seconds=ended.first_hold_seconds * 2 ** (ended.fruitless - 1),
        exclude=_blamed_twice(ended.suspects),
    )


def _blamed_twice(suspects: tuple[str | None, ...]) -> tuple[str, ...]:
    """The node where the last two attempts failed first, if it is the same; one failure may be chance."""
    last = suspects[-2:]
    return (last[0],) if len(last) == 2 and last[0] is not None and last[0] == last[1] else ()


def suspect_node(srun_stderr: str) -> str | None:
    """The node whose task failed first, from srun's messages: `srun: error: n1: task 3: Exited with exit code 1`."""
    match = re.search(
        r"^srun: error: (\S+): tasks? \S+: (?:Exited|Killed|Terminated|Segmentation|Bus|Aborted|Out)",
        srun_stderr,
        re.MULTILINE,
    )
    return match[1] if match and re.fullmatch(r"[\w.-]+", match[1]) else None


JobFate = Literal["ours", "timeout", "not ours"]


def fate(state: str, reason: str) -> JobFate:
    """Who decides what happens to a job in this state.

    We do while it runs (`ours`). Its time limit ends it for good (`timeout`). Otherwise Slurm or a user ended it.
    """
    if state in ("RUNNING", "SUSPENDED"):
        return "ours"
    return "timeout" if state == "TIMEOUT" or reason == "TimeLimit" else "not ours"
