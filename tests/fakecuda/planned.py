"""What `lvtrain.planning` says of the cases that are measured on the fake device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from lvtrain.planning.memory import ALLOWANCE, LOADED_AHEAD, image_bytes, kept_bytes
from lvtrain.planning.network import Network
from lvtrain.planning.phases import measure, phase_setup
from lvtrain.planning.plan import plan
from lvtrain.planning.setup import FrozenNetwork, Zero
from lvtrain.recipe import files as recipes
from tests.fakecuda.step import Case


@cache
def _measured(recipe: str, network: str) -> tuple[Network, tuple[FrozenNetwork, ...]]:
    return measure(recipes.load(Path(f"lvtrain/recipes/{recipe}.yaml"), [network]))


def planned_bytes(case: Case) -> tuple[float, float]:
    """Bytes that stay between steps, and at the fullest moment of one, with the one batch of images that `step` has."""
    recipe = recipes.load(Path(f"lvtrain/recipes/{case.recipe}.yaml"), list(case.changes))
    phase = next(phase for phase in recipe.phases if phase.name == case.phase)
    name = next((change for change in case.changes if change.startswith("backbone.name=")), "")
    setup = phase_setup(recipe, phase, *_measured(case.recipe, name or f"backbone.name={recipe.backbone.name}"))
    found = plan(replace(setup, ranks=case.ranks, accumulation=phase.micro_batches // case.ranks, zero=Zero(1)))
    waiting = image_bytes(found.setup) * (LOADED_AHEAD - 1)
    return sum(kept_bytes(found.setup).values()) - waiting, found.total_memory - ALLOWANCE - waiting
