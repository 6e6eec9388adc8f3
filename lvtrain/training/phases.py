"""When a phase ends: the cosine stage scheduler (CSS), the phase's longest length, or the end of the schedule.

CSS (LVFace, arXiv 2501.13420): s(t) is the mean over the global batch of cos^2(theta_{i, y_i}); a phase ends when it reaches delta. So that one lucky
batch does not end a phase, the mean over a window of steps is compared, at every full window counted from the phase's start (our reading).
Comparing once a window, from a running sum on the device, costs one host read a window instead of one a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lvtrain.recipe.sections import Phase


@dataclass(frozen=True)
class PhasePlan:
    """A phase with its longest end in samples, counted from the phase's first sample."""

    phase: Phase
    index: int
    start_step: int
    start_samples: int
    last_samples: int

    def end_by_length(self, samples_seen: int) -> bool:
        return samples_seen >= self.last_samples


def plan_phase(
    phase: Phase, index: int, *, start_step: int, start_samples: int, total: int, samples_per_epoch: int
) -> PhasePlan:
    per = {"global_batch": phase.global_batch, "samples_per_epoch": samples_per_epoch}
    last = total
    if phase.end.at_most is not None:
        last = min(last, start_samples + phase.end.at_most.samples(**per))
    if phase.end.until is not None:
        last = min(last, phase.end.until.samples(**per))
    return PhasePlan(phase, index, start_step, start_samples, last)


class CosineStage:
    """The running window of cos^2, on the device, and its last full mean, on the host."""

    def __init__(self, delta: float | None, window: int, device: torch.device) -> None:
        self.delta, self.window = delta, window
        self.sum = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0
        self.last_mean: float | None = None

    def observe(self, cos2: torch.Tensor) -> bool:
        """Adds one step's batch mean; True when a window is full and its mean has reached delta."""
        self.sum += cos2.detach()
        self.count += 1
        if self.count < self.window:
            return False
        self.last_mean = float(self.sum) / self.count
        self.sum.zero_()
        self.count = 0
        return self.delta is not None and self.last_mean >= self.delta

    def state(self) -> dict[str, Any]:
        return {"sum": float(self.sum), "count": self.count, "last_mean": self.last_mean}

    def load_state(self, state: dict[str, Any]) -> None:
        self.sum.fill_(state["sum"])
        self.count, self.last_mean = state["count"], state["last_mean"]


def phase_end_reason(plan: PhasePlan, samples_seen: int, *, reached_delta: bool, total: int) -> str | None:
    """Why the phase ends here: 'cos2', 'length', 'schedule', or None when it goes on."""
    if samples_seen >= total:
        return "schedule"
    if reached_delta:
        return "cos2"
    return "length" if plan.end_by_length(samples_seen) else None
