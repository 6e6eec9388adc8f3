"""What is measured between two log lines: the mean loss, the method's figures, the pace."""

from __future__ import annotations

import time
from typing import Any

import torch

from lvtrain.distributed import world as worlds


class Meter:
    """Sums kept on the device and read once a log line; steps that were skipped as not finite are left out.

    Loss and figures are means over the steps since the last log line, a step's over its micro-batches and all ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, loss: torch.Tensor, micro_steps: list[dict[str, torch.Tensor]]) -> None:
        """One step: its loss over all ranks, and the scalars each of this rank's micro-steps gave (the same names each time)."""
        self.loss_sum += loss
        self.steps += 1
        for figures in micro_steps:
            for name, value in figures.items():
                held = self.sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=self.device))
                held += value.detach().to(torch.float64) / len(micro_steps)

    def means(self) -> tuple[float | None, dict[str, float]]:
        """The mean loss and figures since the last `clear`; a collective. Figures to six digits: their last bits depend on the number of ranks.

        None and no figures where no step counted: all of them were skipped, on every rank alike."""
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
        """JSON, the same on every rank; a collective."""
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
    """Steps and waiting since the last look; starts over whenever something else than training took time."""

    def __init__(self) -> None:
        self.start(0, 0.0)

    def start(self, step: int, waited: float) -> None:
        self._time, self._step, self._waited = time.perf_counter(), step, waited

    def since(self, step: int, waited: float) -> tuple[float, float]:
        """Steps a second, and the share of the time in which the host waited for data."""
        seconds = time.perf_counter() - self._time
        return (step - self._step) / seconds, (waited - self._waited) / seconds
