"""What to do after an attempt: a pure function of how it ended. No clock, no commands, no files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lvtrain.errors import EXIT_ERROR
from lvtrain.training.outcome import Outcome

MAX_FRUITLESS = 3


@dataclass(frozen=True)
class Ended:
    """How an attempt ended, as seen by the batch script."""

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
class Finished:
    reason: str


@dataclass(frozen=True)
class Again:
    """Try the phase again: now, or after `hold_seconds`, without the nodes in `exclude`."""

    reason: str
    hold_seconds: int = 0
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stop:
    reason: str


Decision = Finished | Again | Stop


def decide(ended: Ended) -> Decision:
    """Done: finished. Error: stop. Stopped on request, or crashed: again, unless three attempts made no progress."""
    if ended.phase_done:
        return Finished(f"phase {ended.phase} is done at step {ended.step_after}")
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
        return Again(f"{how} at step {ended.step_after}")
    return Again(
        f"{how} without progress past step {ended.step_after}",
        hold_seconds=ended.first_hold_seconds * 2 ** (ended.fruitless - 1),
        exclude=_blamed_twice(ended.suspects),
    )


def _blamed_twice(suspects: tuple[str | None, ...]) -> tuple[str, ...]:
    """A node is left out once the last two attempts failed there first; once may be chance."""
    last = suspects[-2:]
    return (last[0],) if len(last) == 2 and last[0] is not None and last[0] == last[1] else ()


def suspect_node(srun_stderr: str) -> str | None:
    """The node whose task failed first, by srun's own messages: `srun: error: n1: task 3: Exited with exit code 1`."""
    match = re.search(
        r"^srun: error: (\S+): tasks? \S+: (?:Exited|Killed|Terminated|Segmentation|Bus|Aborted|Out)",
        srun_stderr,
        re.MULTILINE,
    )
    return match[1] if match and re.fullmatch(r"[\w.-]+", match[1]) else None


JobFate = Literal["ours", "timeout", "not ours"]


def fate(state: str, reason: str) -> JobFate:
    """Who decides about a job in this state: we while it runs; its time limit ends it for good; else Slurm or its user."""
    if state in ("RUNNING", "SUSPENDED"):
        return "ours"
    return "timeout" if state == "TIMEOUT" or reason == "TimeLimit" else "not ours"
