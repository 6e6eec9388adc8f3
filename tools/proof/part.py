"""What a part of the proof is, what it is held to, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ran", "failed", "not run", "skipped"]


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of a part's result.

    Attributes:
        text: what is promised, with its unit and condition.
        figure: keys into the result, joined by `/`.
        at_most, at_least: the bound; a boolean counts as 0 or 1.
    """

    text: str
    figure: str
    at_most: float | None = None
    at_least: float | None = None

    def value(self, result: dict[str, Any]) -> Any:
        """The figure; None where the result has none."""
        found: Any = result
        for key in self.figure.split("/"):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def is_met(self, result: dict[str, Any]) -> bool:
        value = self.value(result)
        if value is None:
            return False
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)


@dataclass(frozen=True)
class Part:
    """One question to the GPU.

    Attributes:
        name: of the part and of its JSON file.
        question: that it answers.
        function: of `tools.proof.work`, called in a process of its own.
        options: its arguments.
        small: those that differ in a rehearsal.
        seconds: the most that it may take.
        needs: packages besides PyTorch's that it imports.
        goals: that its result is held to.
    """

    name: str
    question: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    seconds: float = 60.0
    needs: tuple[str, ...] = ()
    goals: tuple[Goal, ...] = ()


@dataclass
class Ended:
    """How a part ended.

    Attributes:
        why: what failed, which package is missing, or that the time was over.
        result: what the part returned.
        log: the end of what it printed, where it failed.
    """

    part: Part
    state: State
    seconds: float = 0.0
    why: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    log: str = ""

    @property
    def is_good(self) -> bool:
        return self.state == "ran" and all(goal.is_met(self.result) for goal in self.part.goals)
