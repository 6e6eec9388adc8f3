"""What is measured between two log lines: the mean loss, the method's figures, the speed."""

from __future__ import annotations

import time
from typing import Any

import torch

from lvtrain.distributed import world as worlds


class Meter:
    """Means of loss and figures over the steps since the last log line, over all micro-batches and ranks.

    The sums stay on the device and are read once per log line. Steps that were skipped because their loss was not finite
    do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, loss: torch.Tensor, micro_steps: list[dict[str, torch.Tensor]]) -> None:
        """Adds a step.

        Args:
            loss: of the step, over all ranks, scalar.
            micro_steps: figures of this rank's micro-batches, scalars; the same names each time.
        """
        self.loss_sum += loss
        self.steps += 1
        for figures in micro_steps:
            for name, value in figures.items():
                held = self.sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=self.device))
                held += value.detach().to(torch.float64) / len(micro_steps)

    def means(self) -> tuple[float | None, dict[str, float]]:
        """The mean loss and figures since the last `clear`; None and no figures if every step was skipped. A collective.

        Figures have six digits, because their last bits depend on the number of ranks.
        """
        if self.steps == 0:
            return None, {}
        means = worlds.mean_over_ranks(torch.stack(list(self.sums.values())) / self.steps).tolist() if self.sums else []
        return float(self.loss_sum) / self.steps, {
            name: float(f"{value:.6g}") for name, value in zip(self.sums, means, strict=True)
        }

    def clear(self) -> None:
        self.loss_sum.zero_()
        self.steps = 0
        for held in self.sums.values():
            held.zero_()

    def state(self) -> dict[str, Any]:
        """As JSON, the same on every rank. A collective."""
        means = worlds.mean_over_ranks(torch.stack(list(self.sums.values()))).tolist() if self.sums else []
        return {"loss": float(self.loss_sum), "steps": self.steps, "figures": dict(zip(self.sums, means, strict=True))}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loss_sum.fill_(state["loss"])
        self.steps = state["steps"]
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self.device)
            for name, value in state["figures"].items()
        }


class Pace:
    """Speed since the last `start`, which is called whenever something other than training took time."""

    def __init__(self) -> None:
        self.start(0, 0.0)

    def start(self, step: int, waited: float) -> None:
        self._time, self._step, self._waited = time.perf_counter(), step, waited

    def since(self, step: int, waited: float) -> tuple[float, float]:
        """Steps per second, and the share of the time in which the host waited for data."""
        seconds = time.perf_counter() - self._time
        return (step - self._step) / seconds, (waited - self._waited) / seconds
