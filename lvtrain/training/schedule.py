"""Learning rate as a pure function of samples seen: nothing is stepped, nothing is saved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lvtrain.errors import UserError
from lvtrain.recipe.sections import Phase, Schedule


@dataclass(frozen=True)
class LearningRate:
    """`at(samples_seen)` is the rate of the step that starts there.

    The first step of a warm-up already moves: with w warm-up steps, step k (from 0) has (k + 1) / w of the peak. After it the rate falls
    from the peak at the end of the warm-up to `final` x peak at the end of the schedule.
    """

    peak: float
    total: int
    warmup: int
    shape: str
    power: float = 1.0
    final: float = 0.0

    @property
    def warning(self) -> str | None:
        """For people: not an error, because a short trial of a recipe has one."""
        if self.warmup <= self.total:
            return None
        return (
            f"schedule.warmup ({self.warmup:,} samples) is longer than the whole schedule ({self.total:,}): the learning rate ends at "
            f"{self.total / self.warmup:.0%} of optimizer.lr; shorten schedule.warmup too, unless this is a trial"
        )

    def at(self, samples_seen: int, step_samples: int) -> float:
        if samples_seen < self.warmup:
            return self.peak * min(1.0, (samples_seen + step_samples) / self.warmup)
        progress = min(1.0, (samples_seen - self.warmup) / max(1, self.total - self.warmup))
        if self.shape == "polynomial":
            share = (1.0 - progress) ** self.power
        elif self.shape == "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            share = 1.0
        return self.peak * (self.final + (1.0 - self.final) * share)


def learning_rate(schedule: Schedule, peak: float, *, phases: list[Phase], samples_per_epoch: int) -> LearningRate:
    """Turns the recipe's durations into samples.

    Raises:
        UserError: a schedule in steps although the phases' batches differ, so that a step has no one length.
    """
    batches = {phase.global_batch for phase in phases}
    for name, duration in (("total", schedule.total), ("warmup", schedule.warmup)):
        if duration.unit == "steps" and duration.amount and len(batches) > 1:
            raise UserError(
                f"schedule.{name} is in steps but the phases' global batches differ ({sorted(batches)}); write it in epochs or samples"
            )
    per = {"global_batch": phases[0].global_batch, "samples_per_epoch": samples_per_epoch}
    return LearningRate(
        peak=peak,
        total=schedule.total.samples(**per),
        warmup=schedule.warmup.samples(**per),
        shape=schedule.shape,
        power=schedule.power,
        final=schedule.final,
    )
