"""How many micro-batches a phase has whose recipe does not say. It is decided once, at the first start of a run."""

from __future__ import annotations

from typing import Any

import torch

from lvtrain.distributed import world as worlds
from lvtrain.distributed.world import World
from lvtrain.planning import planned_micro_batches
from lvtrain.recipe.sections import Recipe
from lvtrain.training.run_folder import has_begun, recipe_before


def with_recorded_micro_batches(recipe: Recipe) -> Recipe:
    """The recipe with the micro-batches of the run in its folder, where the recipe leaves them open.

    So what the first start decided stays, on any GPU and in any version.

    Raises:
        UserError: the run has trained and its recipe is lost.
    """
    if not recipe.open_phases or not has_begun(recipe.run_folder):
        return recipe
    before = {phase.get("name"): phase for phase in recipe_before(recipe.run_folder).get("phases", [])}
    counts = {}
    for phase in recipe.open_phases:
        recorded = before.get(phase.name, {})
        # another global batch is refused later, when the recipes are compared
        if recorded.get("global_batch") == phase.global_batch and "micro_batches" in recorded:
            counts[phase.name] = recorded["micro_batches"]
    return recipe.with_micro_batches(counts)


def decide_micro_batches(recipe: Recipe, ds_config: dict[str, Any], *, num_classes: int, world: World) -> Recipe:
    """The recipe with the micro-batches of every phase: as recorded, else planned for the smallest GPU of this start.

    On a CPU they are the recipe's default. Rank 0 decides. A collective.

    Raises:
        UserError: the run has trained and its recipe is lost.
    """
    if not recipe.open_phases:
        return recipe
    memory = None
    if world.device.type == "cuda":
        memory = min(worlds.gather_objects(torch.cuda.get_device_properties(world.device).total_memory))

    def decide() -> dict[str, int]:
        decided = with_recorded_micro_batches(recipe)
        if memory is not None and not has_begun(recipe.run_folder):
            zero = ds_config["zero_optimization"]
            planned = planned_micro_batches(recipe, memory=memory, ranks=world.size, zero=zero, num_classes=num_classes)
            decided = decided.with_micro_batches(planned)
            for before, phase in zip(recipe.phases, decided.phases, strict=True):
                if before.micro_batches != phase.micro_batches:
                    print(
                        f"lvtrain: phases.{phase.name}.micro_batches={phase.micro_batches} for this run: "
                        f"{before.micro_batch} images each do not fit {memory / 1e9:.0f} GB by the plan",
                        flush=True,
                    )
        return {phase.name: phase.micro_batches for phase in decided.phases}

    return recipe.with_micro_batches(worlds.on_first(decide))
