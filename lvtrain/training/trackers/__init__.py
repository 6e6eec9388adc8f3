"""Trackers: where a run's metrics are shown besides `metrics.jsonl`. One file per tracker.

A tracker is chosen by name in the recipe, `logging.trackers: [tensorboard]`. To add one, write a file here:

    @TRACKERS.register("mine")
    class Mine(Tracker):
        package = "mine"  # what must be installed

        def metrics(self, row): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lvtrain.recipe.trackers import TRACKERS, TrackerSection

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "TrackerSection", "numbers"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker may show of the run itself.

    Attributes:
        folder: the run folder.
        run_id: stays the same over all starts of the run.
        recipe: resolved, as plain values.
    """

    folder: Path
    run_id: str
    recipe: dict[str, Any]


class Tracker(ABC):
    """Lives on rank 0, as long as one start. If a method raises, the tracker is reported and switched off; training continues.

    Attributes:
        package: the Python package it needs; a start without it is refused.
        section: its settings in the recipe.
    """

    package: ClassVar[str]
    section: ClassVar[type[TrackerSection]] = TrackerSection

    def __init__(self, settings: TrackerSection, run: TrackedRun) -> None:
        self.settings, self.run = settings, run

    def begin(self, step: int) -> None:
        """Called before the first row, and after a roll-back: rows of steps after `step` are to be forgotten."""

    @abstractmethod
    def metrics(self, row: dict[str, Any]) -> None:
        """One row of `metrics.jsonl`: has `step`; values are numbers, strings or None."""

    def event(self, row: dict[str, Any]) -> None:
        """One row of `events.jsonl`: has `event`. An "evaluation" has `step` and `figures`, a number per benchmark."""

    def close(self) -> None:
        """Called once, at the end of the start."""


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics, without `step` and `time`."""
    return {n: v for n, v in row.items() if isinstance(v, (int, float)) and n not in ("time", "step")}
