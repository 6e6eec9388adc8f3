"""How many micro-batches a phase has whose recipe does not say: as few as the recipe's own default, if they fit by the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lvtrain.planning.device import H200
from lvtrain.planning.phases import divisors, measure, phase_setup
from lvtrain.planning.plan import plan
from lvtrain.planning.setup import Setup, Zero
from lvtrain.planning.suggest import ROOM
from lvtrain.recipe.sections import Phase, Recipe


def planned_micro_batches(
    recipe: Recipe, *, memory: float, ranks: int, zero: Mapping[str, Any] | None = None, num_classes: int | None = None
) -> dict[str, int]:
    """The number of micro-batches of every phase that does not say it, by name.

    It is the recipe's default (at most 128 images each) where that fits, so that nearly every GPU trains the same
    micro-batches. Else it is the smallest multiple of the default that fits `ROOM` of the memory. So every number of ranks
    that divides the default can train. Where nothing fits by the plan, which may be wrong, the default stays.

    Args:
        recipe: resolved.
        memory: of one GPU, bytes.
        ranks: GPUs.
        zero: DeepSpeed's `zero_optimization` section; stage 1 if absent.
        num_classes: the recipe's `data.num_classes` if absent.
    """
    if not recipe.open_phases:
        return {}
    network, frozen = measure(recipe)
    found = {}
    for phase in recipe.open_phases:
        setup = replace(
            phase_setup(recipe, phase, network, frozen, num_classes=num_classes),
            ranks=ranks,
            zero=Zero.of(zero or {}),
            device=replace(H200, memory=memory),
        )
        found[phase.name] = next(
            (
                phase.micro_batches * times
                for times in divisors(phase.micro_batch)
                if plan(_cut(setup, phase, times)).total_memory <= ROOM * memory
            ),
            phase.micro_batches,
        )
    return found


def _cut(setup: Setup, phase: Phase, times: int) -> Setup:
    """The phase with `times` as many micro-batches; with several of a rank in a step, gradients wait for the next."""
    accumulation = max(1, phase.micro_batches * times // setup.ranks)
    return replace(setup, micro_batch=phase.micro_batch // times, accumulation=accumulation)
