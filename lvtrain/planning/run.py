"""A whole run on one screen: days, GPU-hours, cost, and memory a GPU against what the GPU has. One line a phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lvtrain.planning.plan import Plan

WIDTH = 100  # columns of the screen
_NAME = 24


@dataclass(frozen=True)
class RunPlan:
    """A plan for every phase, and how long each lasts.

    Attributes:
        phases: the plan of one step of each phase, by its name.
        images: images of each phase at its latest end; 0 for a phase that the schedule does not reach.
        epoch: images of an epoch.
        price: of a GPU for an hour, in any currency; None if not given.
    """

    phases: Mapping[str, Plan]
    images: Mapping[str, int]
    epoch: int
    price: float | None = None

    def days(self, phase: str) -> float:
        """Of training alone: evaluation, checkpoints and restarts are not counted."""
        found = self.phases[phase]
        return self.images[phase] / (found.images_per_second * found.setup.ranks) / 86400

    def gpu_hours(self, phase: str) -> float:
        return 24 * self.days(phase) * self.phases[phase].setup.ranks

    @property
    def total_gpu_hours(self) -> float:
        return sum(map(self.gpu_hours, self.phases))

    @property
    def parameters(self) -> int:
        """Trained ones of the backbone, and of what the method trains beside it; without class centres."""
        return max(found.setup.network.parameters for found in self.phases.values())

    @property
    def fits(self) -> bool:
        return all(found.fits for found in self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each phase by its name, and the sums as "whole run", which no phase may be called."""
        return {
            **{name: found.as_dict() | self._figures([name]) for name, found in self.phases.items()},
            "whole run": self._figures(list(self.phases)) | {"fits": self.fits},
        }

    def _figures(self, names: list[str]) -> dict[str, Any]:
        hours = sum(self.gpu_hours(name) for name in names)
        return {
            "images": sum(self.images[name] for name in names),
            "days": sum(self.days(name) for name in names),
            "gpu_hours": hours,
            "cost": None if self.price is None else hours * self.price,
        }

    def screen(self) -> str:
        """At most 8 lines and one for each phase, of at most `WIDTH` columns."""
        some = next(iter(self.phases.values())).setup
        device, ranks = some.device, some.ranks
        nodes = -(-ranks // device.per_node)
        lines = [
            f"{ranks} x {device.name}, {nodes} node{'s' if nodes > 1 else ''} ({device.links}), ZeRO-{some.zero.stage}, "
            f"{some.precision}{', compiled' if some.compiled else ''}: planned, not measured",
            _row("phase", "epochs", "steps", "micro-batches", f"GB of {device.memory / 1e9:.0f}", "images/s", "days", "GPU-hours"),
        ]  # fmt: skip
        for name, found in self.phases.items():
            setup = found.setup
            count = setup.accumulation * setup.ranks
            lines.append(
                _row(
                    name,
                    f"{self.images[name] / self.epoch:.4g}",
                    f"{self.images[name] // (count * setup.micro_batch):,}",
                    f"{count} x {setup.micro_batch}",
                    f"{found.total_memory / 1e9:.1f}" + ("" if found.fits else " !"),
                    f"{found.images_per_second * setup.ranks:,.0f}",
                    _short(self.days(name)),
                    _short(self.gpu_hours(name)),
                )
            )
        images, days = sum(self.images.values()), sum(map(self.days, self.phases))
        hours, seconds = self.total_gpu_hours, max(days * 86400, 1e-9)
        most = max(found.total_memory for found in self.phases.values())
        whole = ["whole run", f"{images / self.epoch:.4g}", "", "", f"{most / 1e9:.1f}", f"{images / seconds:,.0f}"]
        lines.append(_row(*whole, _short(days), _short(hours)))
        if self.price is not None:
            lines.append(f"cost at {self.price:g} a GPU-hour: {hours * self.price:,.0f}")
        for name in [name for name, found in self.phases.items() if not found.fits][:1]:
            needs = self.phases[name].total_memory / 1e9
            lines.append(f"DOES NOT FIT: {name[:_NAME]} needs {needs:.1f} GB of {device.memory / 1e9:.0f}")
        return "\n".join(lines)


def _row(name: str, *cells: str) -> str:
    widths = (8, 10, 14, 11, 11, 9, 11)
    name = name if len(name) <= _NAME else name[: _NAME - 1] + "…"
    return f"{name:<{_NAME}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _short(number: float) -> str:
    return f"{number:,.2f}" if number < 10 else f"{number:,.1f}" if number < 100 else f"{number:,.0f}"
