"""Where a run stands, its learning rate there, and when a phase ends.

The learning rate is a pure function of the samples seen: nothing is stepped and nothing is saved.

The cosine stage scheduler (CSS, LVFace, arXiv 2501.13420) ends a phase when s(t), the mean over the global batch of
cos^2(theta_{i, y_i}), reaches delta. We compare the mean over a window of steps, so that one lucky batch does not end
a phase, at every full window counted from the phase's start (our reading of the paper). The sum stays on the device,
so the host reads one number per window instead of one per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from lvtrain.checkpoint.checkpoints import CheckpointInfo
from lvtrain.errors import UserError
from lvtrain.recipe.optimizer import Optimizer
from lvtrain.recipe.sections import Phase, Recipe, Schedule


@dataclass
class Position:
    """Where a run stands: a function of the steps trained, and of nothing else.

    Attributes:
        step: steps trained.
        samples_seen: samples trained, in units of whole global batches.
        data_skip: samples that roll-backs have skipped.
        phase_index: number of the phase in the recipe, from 0.
        phase_start_step: `step` where the phase began.
        phase_start_samples: `samples_seen` where the phase began.
        phase_over: whether the phase is complete.
    """

    step: int = 0
    samples_seen: int = 0
    data_skip: int = 0
    phase_index: int = 0
    phase_start_step: int = 0
    phase_start_samples: int = 0
    phase_over: bool = False

    @classmethod
    def stored_in(cls, found: CheckpointInfo) -> Position:
        """The position of a checkpoint."""
        header = {"step": found.step, "samples_seen": found.samples_seen}  # repeated in checkpoints of version 1
        return cls(**(found.meta["position"] | header))

    @property
    def stream(self) -> int:
        """The place in the endless stream of samples."""
        return self.samples_seen + self.data_skip

    @property
    def next_index(self) -> int:
        """Number of the phase that is trained next."""
        return self.phase_index + int(self.phase_over)

    def next_phase(self) -> Position:
        """The start of the phase after one that is over."""
        return replace(
            self,
            phase_index=self.phase_index + 1,
            phase_start_step=self.step,
            phase_start_samples=self.samples_seen,
            phase_over=False,
        )


@dataclass(frozen=True)
class LearningRate:
    """`at(samples_seen, step_samples)` is the rate of the step that starts there.

    With w warm-up steps, step k (from 0) has (k + 1) / w of the peak. After the warm-up the rate falls from the peak to
    `final` times the peak at the end of the schedule.
    """

    optimizer: Optimizer
    total: int
    warmup: int
    shape: str
    final: float = 0.0

    def at(self, samples_seen: int, step_samples: int) -> float:
        peak = self.optimizer.peak_for(step_samples)
        if samples_seen < self.warmup:
            return peak * min(1.0, (samples_seen + step_samples) / self.warmup)
        progress = min(1.0, (samples_seen - self.warmup) / max(1, self.total - self.warmup))
        if self.shape in ("polynomial", "quadratic"):
            share = (1.0 - progress) ** (1.0 if self.shape == "polynomial" else 2.0)
        elif self.shape == "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            share = 1.0
        return peak * (self.final + (1.0 - self.final) * share)


def learning_rate(
    schedule: Schedule, optimizer: Optimizer, *, phases: list[Phase], samples_per_epoch: int
) -> LearningRate:
    """Turns the recipe's durations into samples.

    Raises:
        UserError: the warm-up is longer than the schedule; the schedule is in steps, but the phases' global batches
            differ, so a step has no fixed length.
    """
    batches = {phase.global_batch for phase in phases}
    for name, duration in (("total", schedule.total), ("warmup", schedule.warmup)):
        if duration.unit == "steps" and duration.amount and len(batches) > 1:
            raise UserError(
                f"schedule.{name} is in steps but the phases' global batches differ ({sorted(batches)}); write it in epochs or samples"
            )
    per = {"global_batch": phases[0].global_batch, "samples_per_epoch": samples_per_epoch}
    total, warmup = schedule.total.samples(**per), schedule.warmup.samples(**per)
    if warmup > total:
        raise UserError(
            f"schedule.warmup={schedule.warmup} is {warmup:,} images, longer than schedule.total={schedule.total} "
            f"({total:,}); shorten schedule.warmup"
        )
    return LearningRate(optimizer=optimizer, total=total, warmup=warmup, shape=schedule.shape, final=schedule.final)


def rate_line(optimizer: Optimizer, phases: list[Phase]) -> str:
    """Peak learning rate and global batch, and the rule between them, for the log."""
    batches = dict.fromkeys(phase.global_batch for phase in phases)
    rates = ", ".join(f"{optimizer.peak_for(batch):.4g} at global batch {batch:,}" for batch in batches)
    rule = "the batch" if optimizer.batch_power == 1 else "the square root of the batch"
    if optimizer.lr_for_batch is None:
        return f"learning rate {rates}: optimizer.lr as it is; with optimizer.lr_for_batch it follows {rule}"
    return f"learning rate {rates}: {optimizer.lr:g} is for {optimizer.lr_for_batch:,}, and it follows {rule}"


def phase_limit(phase: Phase, start_samples: int, *, total: int, samples_per_epoch: int) -> int:
    """Samples seen at the latest end of a phase that began at `start_samples`, in a schedule of `total` samples."""
    per = {"global_batch": phase.global_batch, "samples_per_epoch": samples_per_epoch}
    limit = total
    if phase.end.at_most is not None:
        limit = min(limit, start_samples + phase.end.at_most.samples(**per))
    if phase.end.until is not None:
        limit = min(limit, phase.end.until.samples(**per))
    return limit


def phase_images(recipe: Recipe, *, samples_per_epoch: int) -> dict[str, int]:
    """Images of each phase, by name, if every phase lasts as long as it may; 0 where the schedule ends before the phase.

    Raises:
        UserError: as `learning_rate`.
    """
    rate = learning_rate(recipe.schedule, recipe.optimizer, phases=recipe.phases, samples_per_epoch=samples_per_epoch)
    start, images = 0, {}
    for phase in recipe.phases:
        limit = phase_limit(phase, start, total=rate.total, samples_per_epoch=samples_per_epoch)
        # a step is trained whole, so a phase ends at or after its limit
        images[phase.name] = max(0, -(-(limit - start) // phase.global_batch) * phase.global_batch)
        start += images[phase.name]
    return images


def phase_end_reason(samples_seen: int, *, limit: int, total: int, reached_delta: bool) -> str | None:
    """Why the phase ends here: "cos2", "length" or "schedule"; None when it continues."""
    if samples_seen >= total:
        return "schedule"
    if reached_delta:
        return "cos2"
    return "length" if samples_seen >= limit else None


def what_is_complete(
    position: Position, phases: list[Phase], *, total: int, only_phase: str | None = None
) -> str | None:
    """What is complete, the run or the one phase asked for; None while there is something to train.

    Raises:
        UserError: the phase asked for cannot be next.
    """
    names = [phase.name for phase in phases]
    index = position.next_index
    if position.phase_over and position.samples_seen >= total:
        never = f", before {' and '.join(names[index:])} began" if index < len(names) else ""
        return f"the schedule is complete{never}"
    if index >= len(names):
        return "every phase is complete"
    if only_phase is None or names[index] == only_phase:
        return None
    if names.index(only_phase) > index:
        raise UserError(f"--phase {only_phase} cannot start: phase {names[index]} is not finished; train it first")
    return f"phase {only_phase} is complete"


class CosineStage:
    """The running window of cos^2, on the device, and the mean of the last full window, on the host."""

    def __init__(self, delta: float | None, window: int, device: torch.device) -> None:
        self.delta, self.window = delta, window
        self.sum = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0
        self.last_mean: float | None = None

    def observe(self, cos2: torch.Tensor) -> bool:
        """Adds the batch mean of one step; returns True when a window is full and its mean has reached delta."""
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
