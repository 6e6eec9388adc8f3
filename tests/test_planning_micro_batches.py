"""The number of micro-batches where a recipe does not say it: by the plan at the first start, and as recorded ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lvtrain.planning import ROOM, plan_phases, planned_micro_batches
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from lvtrain.training.earlier_starts import with_recorded_micro_batches
from tests.runs import events, output, recipe_file, run
from tests.test_planning_recipes import RECIPES

CLASSES, RANKS = 20_000, 2


def quickstart(**changes: Any) -> Recipe:
    """The quickstart's phases with 1,024 images a step; the second says its micro-batches, the others do not."""
    values = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    for phase in values["phases"]:
        phase["global_batch"] = 1024
        del phase["micro_batches"]
    values["phases"][1]["micro_batches"] = 2
    return recipes.resolve(values | changes)


def test_what_fits_stays_the_recipes_default() -> None:
    """At most 128 images each, on a GPU of any size that has room; a phase that says its number keeps it."""
    recipe = quickstart()
    assert [phase.micro_batches for phase in recipe.phases] == [8, 2, 8]
    for memory in (24e9, 141e9):
        counts = planned_micro_batches(recipe, memory=memory, ranks=RANKS, num_classes=CLASSES)
        assert counts == {"alignment": 8, "refinement": 8}


def test_else_the_fewest_that_fit() -> None:
    recipe = quickstart()
    for memory in (2.60e9, 2.70e9):
        counts = planned_micro_batches(recipe, memory=memory, ranks=RANKS, num_classes=CLASSES)
        assert max(counts.values()) > 8
        for other in (8, 16, 32, 64, 256):
            plans = plan_phases(
                recipe.with_micro_batches(dict.fromkeys(counts, other)), ranks=RANKS, num_classes=CLASSES
            )
            for name, count in counts.items():
                assert (plans[name].total_memory <= ROOM * memory) == (other >= count)


def test_where_nothing_fits_the_default_stays() -> None:
    """The plan's allowance alone is larger; it may be wrong, so that it does not stop a start."""
    counts = planned_micro_batches(quickstart(), memory=1e9, ranks=RANKS, num_classes=CLASSES)
    assert counts == {"alignment": 8, "refinement": 8}


def test_a_run_goes_on_with_what_its_first_start_decided(tiny_faces: Path, tmp_path: Path) -> None:
    """The first start has 4 micro-batches of 4 images, as a small GPU may decide; the recipe's default is one of 16."""
    recipe = recipe_file(tmp_path, tiny_faces / "train")
    assert run(recipe, "schedule.total=3 steps") == 0, output(recipe)
    values = yaml.safe_load(recipe.read_text())
    for phase in values["phases"]:
        del phase["micro_batches"]
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    opened = recipes.load(recipe)
    assert [phase.micro_batches for phase in opened.phases] == [1, 1, 1]
    assert [phase.micro_batches for phase in with_recorded_micro_batches(opened).phases] == [4, 4, 4]

    assert run(recipe, "schedule.total=6 steps", ranks=2) == 0, output(recipe)  # two ranks do not divide the default
    recorded = yaml.safe_load((tmp_path / "runs" / "tiny" / "recipe.yaml").read_text())
    assert [phase["micro_batches"] for phase in recorded["phases"]] == [4, 4, 4]
    changed = [event["change"] for event in events(tmp_path / "runs" / "tiny") if event["event"] == "recipe_changed"]
    assert not any("micro_batches" in change for change in changed)

    other = recipes.load(recipe, ["name=other"])
    assert with_recorded_micro_batches(other) == other
