"""Evaluations during training: under which name, of which weights, and which one an earlier start still owes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lvtrain.distributed import world as worlds
from lvtrain.engine.precision import at_precision
from lvtrain.evaluation import Setting, run_benchmarks
from lvtrain.recipe.sections import Recipe
from lvtrain.training.phase_state import PhaseState
from lvtrain.training.run_log import RunLog
from lvtrain.training.schedule import Position


class Evaluations:
    """The evaluations of a run by the recipe's benchmarks; none without benchmarks. All methods are collectives.

    Args:
        total: samples of the schedule.
    """

    def __init__(self, recipe: Recipe, log: RunLog, *, total: int) -> None:
        self.recipe, self.log, self.total = recipe, log, total

    def is_last(self, position: Position) -> bool:
        """Whether the run is over at `position`."""
        over = position.next_index == len(self.recipe.phases) or position.samples_seen >= self.total
        return position.phase_over and over

    def make(self, phase: PhaseState, name: str | None = None) -> None:
        """Evaluates the phase's weights and their average as `name`: by default `final` or by the step."""
        if self.recipe.evaluation.benchmarks:
            self.log.evaluation(phase, name or self._name(phase.position), self._results(phase))
            phase.restart_clock()

    def is_missing(self, position: Position) -> bool:
        """Whether an earlier start was killed before it wrote the evaluation at `position`, which was due."""
        path = self.log.folder.path / "evaluation" / f"{self._name(position)}.json"
        return bool(self.recipe.evaluation.benchmarks) and not worlds.on_first(path.exists)

    def _name(self, position: Position) -> str:
        return "final" if self.is_last(position) else f"step_{position.step:09d}"

    def _results(self, phase: PhaseState) -> dict[str, Any]:
        recipe, world = self.recipe, phase.setup.world

        def figures(module: nn.Module) -> dict[str, Any]:
            forward = at_precision(module, recipe.optimizer.precision, world.device)
            setting = Setting(world, world.device, image_size=recipe.backbone.image_size)
            return run_benchmarks(forward, recipe.evaluation.benchmarks, setting)

        results = phase.place()
        phase.engine.eval()
        with phase.engine.full_parameters(), torch.no_grad():
            results["benchmarks"] = figures(phase.method.evaluated())
            if phase.average:
                results["benchmarks_ema"] = figures(phase.average.module.eval())
        return results
