"""Where a run stands: a few integers, a function of trained steps and of nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Position:
    """`samples_seen` is the place in the endless stream of samples; `data_skip` is what a roll-back leapt over and adds to it."""

    step: int = 0
    samples_seen: int = 0
    data_skip: int = 0
    phase_index: int = 0
    phase_start_step: int = 0
    phase_start_samples: int = 0
    phase_over: bool = False

    @property
    def stream(self) -> int:
        return self.samples_seen + self.data_skip

    def next_phase(self) -> Position:
        """The start of the phase after one that is over."""
        return Position(
            self.step, self.samples_seen, self.data_skip, self.phase_index + 1, self.step, self.samples_seen
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
