"""The cheapest setting that fits: every ZeRO stage, number of micro-batches and recomputation is planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from lvtrain.backbones.memory import Recompute
from lvtrain.errors import UserError
from lvtrain.planning.device import H200, Device
from lvtrain.planning.phases import divisors, measure, phase_setup
from lvtrain.planning.plan import Plan, plan
from lvtrain.planning.setup import Setup, Zero
from lvtrain.recipe.sections import Phase, Recipe

# of the GPU's memory that a suggestion may take: planned memory may be wrong by a tenth
ROOM = 0.9
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Suggestion:
    """A setting and its plans.

    Attributes:
        stage: of ZeRO.
        checkpoint_blocks: what backward recomputes.
        phases: the plan of each phase, by name.
        tried: settings of one phase that were planned, over all phases.
    """

    stage: int
    checkpoint_blocks: str
    phases: Mapping[str, Plan]
    tried: int

    @property
    def ds_config(self) -> dict[str, Any]:
        return {"zero_optimization": {"stage": self.stage}}

    @property
    def overrides(self) -> list[str]:
        """Changes to the recipe, as on the command line."""
        counts = {name: found.setup.accumulation * found.setup.ranks for name, found in self.phases.items()}
        return [
            f"backbone.checkpoint_blocks={self.checkpoint_blocks}",
            *(f"phases.{name}.micro_batches={count}" for name, count in counts.items()),
        ]


def suggest(
    recipe: Recipe, images: Mapping[str, int], *, ranks: int, num_classes: int | None = None, device: Device = H200
) -> Suggestion:
    """The setting of the least GPU time over all phases whose plans take at most `ROOM` of the GPU's memory.

    Args:
        recipe: its ZeRO stage, micro-batches and recomputation are what is chosen.
        images: of each phase, by name.
        ranks: GPUs.
        num_classes: the recipe's `data.num_classes` if absent.
        device: the GPU and its links.

    Raises:
        UserError: nothing fits.
    """
    best: tuple[float, Suggestion] | None = None
    tried, least = 0, float("inf")
    for mode in get_args(Recompute):
        changed = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"checkpoint_blocks": mode})})
        network, frozen = measure(changed)
        setups = {
            phase.name: phase_setup(changed, phase, network, frozen, num_classes=num_classes) for phase in recipe.phases
        }
        for stage in STAGES:
            if stage == 3 and recipe.backbone.compile:
                continue  # torch.compile does not see ZeRO-3's hooks
            chosen: dict[str, Plan] = {}
            for phase in recipe.phases:
                setup = replace(setups[phase.name], ranks=ranks, zero=Zero(stage), device=device)
                plans = [plan(one) for one in cuts(setup, phase)]
                tried, least = tried + len(plans), min([least, *(found.total_memory for found in plans)])
                fitting = [found for found in plans if found.total_memory <= ROOM * device.memory]
                if fitting:
                    chosen[phase.name] = min(fitting, key=lambda found: (found.step_seconds, found.total_memory))
            if len(chosen) == len(recipe.phases):
                seconds = sum(images[name] / found.images_per_second for name, found in chosen.items())
                if best is None or seconds < best[0]:
                    best = (seconds, Suggestion(stage, mode, chosen, 0))
    if best is None:
        raise UserError(
            f"no ZeRO stage, micro-batches and recomputation fit {ROOM:.0%} of {device.memory / 1e9:.0f} GB on {ranks} "
            f"GPUs (the smallest needs {least / 1e9:.1f} GB); use more GPUs, a sample_rate below 1, or "
            "classifier.optimizer.moments=bfloat16"
        )
    return replace(best[1], tried=tried)


def cuts(setup: Setup, phase: Phase) -> Iterator[Setup]:
    """The phase's global batch cut into every number of micro-batches that the ranks can share.

    Raises:
        UserError: the ranks do not divide the global batch.
    """
    if phase.global_batch % setup.ranks:
        raise UserError(
            f"phases.{phase.name}: {setup.ranks} GPUs do not divide global_batch={phase.global_batch}; "
            f"use one of {', '.join(map(str, divisors(phase.global_batch)))}"
        )
    for accumulation in divisors(phase.global_batch // setup.ranks):
        images = phase.global_batch // setup.ranks // accumulation
        yield replace(setup, micro_batch=images, accumulation=accumulation)
